from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mars.generation.engine import draw
from mars.generation.request import DrawRequest
from mars.generation.sampling import Sampling
from mars.image_tokenizer.config import ImageTokenizerConfig
from mars.image_tokenizer.model import ImageTokenizer
from mars.model.config import ModelConfig
from mars.model.costs import (
    STORAGES,
    FlopCount,
    Storage,
    cache_bytes,
    count_parameters,
    image_tokenizer_flops,
    meta_image_tokenizer,
    meta_transformer,
    part_of,
    weight_bytes,
)
from mars.model.quantized import QuantizedLinear
from mars.model.transformer import MarsTransformer, read_prefixes
from mars.sequence.interleaved import ImagePart, Part, TextPart, interleaved
from mars.sequence.layout import Modality, drawn_image
from mars.training.cross_entropy import token_loss
from mars.training.interleaved import interleaved_states
from mars.training.losses import captioning_loss, text_to_image_loss
from mars.training.upscale import upscale_loss

Build = Callable[..., MarsTransformer]
NARROW: dict[str, Any] = {"share_norms": False, "init": "random", "visual_width": 24, "visual_ffn": 40}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"share_norms": False},
    {"duplicate_output": False},
    {**NARROW, "visual_layers": (1,), "grid_embedding": True, "head_norms": True},
    {"visual_layers": (0, 2), "language": {"num_kv_heads": 4, "qkv_bias": True, "tied_embeddings": False}},
]
CODEC = ImageTokenizerConfig(num_codes=16, code_width=8, channels=(32, 64), blocks_per_level=1, middle_attention=True)


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """PyTorch's own count of matrix products; the fused attention of CPUs is not in its books, the plain one is."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


@pytest.mark.parametrize("options", OPTIONS)
def test_parameters_are_those_of_a_real_model(build: Build, options: dict[str, Any]) -> None:
    real = build(**options)
    counts = count_parameters(meta_transformer(real.config))
    for part, count in counts.items():
        assert count == sum(weight.numel() for name, weight in real.named_parameters() if part_of(name) == part)
    language = sum(weight.numel() for weight in real.language_tensors().values())
    visual = sum(weight.numel() for weight in real.visual_tensors().values())
    assert counts["language layers"] + counts["language tables"] == language
    assert counts["visual layers"] + counts["visual tables"] == visual


@pytest.mark.parametrize("options", OPTIONS)
def test_bytes_at_full_precision_are_those_in_memory(build: Build, options: dict[str, Any]) -> None:
    real, codec = build(**options), ImageTokenizer(CODEC)
    sizes = weight_bytes(meta_transformer(real.config), meta_image_tokenizer(CODEC), STORAGES["fp32"])
    parts = {name: size for name, size in sizes.items() if name.split()[0] in ("language", "visual", "image")}
    assert sum(parts.values()) == sum(weight.nbytes for module in (real, codec) for weight in module.parameters())


def test_small_weights_have_scales_and_leave_the_embeddings_alone(build: Build) -> None:
    config = build().config
    meta, codec = meta_transformer(config), meta_image_tokenizer(CODEC)
    sizes = {name: weight_bytes(meta, codec, storage) for name, storage in STORAGES.items()}
    assert sizes["int4"]["image tokenizer"] == sizes["int8"]["image tokenizer"] == sizes["bf16"]["image tokenizer"]
    assert sizes["int4"]["language tables"] == sizes["int8"]["language tables"]  # tied: the head is the embedding
    embeddings = sum(weight.nbytes for name, weight in meta.named_parameters() if name.endswith("l_embedding.weight"))
    assert embeddings // 2 < sizes["int4"]["visual tables"] < sizes["int8"]["visual tables"]
    assert sizes["int8"]["visual tables"] < sizes["bf16"]["visual tables"] == sizes["fp32"]["visual tables"] // 2
    width, ffn, keys = 32, 48, 16
    # (outputs, inputs) of q, k, v, o, gate, up, down
    shapes = [(width, width), (keys, width), (keys, width), (width, width), (ffn, width), (ffn, width), (width, ffn)]
    weights, rows = sum(a * b for a, b in shapes), sum(a for a, _ in shapes)
    # down's 48 inputs are a group of 32 and one of 16
    assert sizes["int8"]["visual layers"] == 3 * (weights + 2 * (rows + width))
    assert sizes["int4"]["visual layers"] == 3 * (weights // 2 + 2 * (rows + width))
    wide = Storage(bits=4, other_bytes=2, group=64)
    assert weight_bytes(meta, codec, wide)["visual layers"] == 3 * (weights // 2 + 2 * rows)


@pytest.mark.parametrize(("name", "bits"), [("int8", 8), ("int4", 4)])
def test_small_weights_take_what_a_quantized_layer_takes(name: str, bits: Literal[4, 8]) -> None:
    weight = torch.randn(48, 96)
    assert STORAGES[name].size(weight, matrix=True) == QuantizedLinear(weight, bits=bits).num_bytes


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_drawing_a_code_reads_what_is_said_and_nothing_else(build: Build, options: dict[str, Any]) -> None:
    """A weight of NaN is heard if it is read: exactly the tensors that are counted spoil the next code."""
    real = build(**options)
    counted_bytes = weight_bytes(
        meta_transformer(real.config), meta_image_tokenizer(CODEC), Storage(bits=32, other_bytes=4)
    )
    prefixes = read_prefixes(real, [[3, 1, 4]])
    segment = drawn_image(torch.tensor([[[1, 5], [2, 7]]]), real.vocabulary)

    def logits() -> torch.Tensor:
        cache = real.new_cache()
        cache.load(prefixes)
        return real.visual_logits(real(segment, cache))

    read = 0
    for name, weight in real.named_parameters():
        if name.startswith(("visual_embedding", "visual_grid")):
            continue  # one row of each is read
        kept = weight.clone()
        weight.fill_(torch.nan)
        read += weight.nbytes if bool(logits().isnan().any()) else 0
        weight.copy_(kept)
    assert read == counted_bytes["read per code"]
    visual = sum(weight.nbytes for weight in real.visual_tensors().values()) + counted_bytes["image tokenizer"]
    borrowed = counted_bytes["kept after the prompt"] - visual
    assert (borrowed > 0) == bool(real.config.semvie.share_norms or not real.config.semvie.duplicate_output)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_cache_takes_what_is_said(build: Build, options: dict[str, Any]) -> None:
    real = build(**options)
    told = cache_bytes(meta_transformer(real.config), itemsize=4)
    for name, images_only in (("drawing", True), ("writing text", False)):
        cache = real.new_static_cache(batch=3, size=17, images_only=images_only)
        assert told[name] * 3 * 17 == cache.store.nbytes


def request(prompt: int, *, guidance: float) -> DrawRequest:
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, guidance=guidance)
    text = tuple(range(1, prompt + 1))
    return DrawRequest(prompt=text, free=text[::-1], grid=(3, 4), seed=0, sampling=sampling)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_drawing_costs_what_pytorch_counts(build: Build, options: dict[str, Any], guidance: float) -> None:
    real = build(**options)
    with counted() as counter:
        draw(real, [request(5, guidance=guidance)])
    expected = FlopCount(meta_transformer(real.config)).draw(prompt=5, codes=12, guided=guidance != 1)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("options", OPTIONS)
def test_a_sample_of_text_to_image_costs_what_pytorch_counts(build: Build, options: dict[str, Any]) -> None:
    real = build(**options)
    codes_BRC = torch.randint(13, (2, 3, 4))
    with counted() as counter:
        prefixes = read_prefixes(real, [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
        text_to_image_loss(real, codes_BRC, prefixes).backward()
    expected = FlopCount(meta_transformer(real.config)).train_text_to_image(caption=5, codes=12)
    assert counter.get_total_flops() == 2 * expected


@pytest.mark.parametrize("options", OPTIONS)
def test_a_sample_of_captioning_costs_what_pytorch_counts(build: Build, options: dict[str, Any]) -> None:
    real = build(**options)
    codes_BRC = torch.randint(13, (2, 3, 4))
    captions = [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]]
    with counted() as counter:
        captioning_loss(real, codes_BRC, captions, hints=[[], []], end=2).backward()
    expected = FlopCount(meta_transformer(real.config)).train_captioning(caption=5, codes=12)
    assert counter.get_total_flops() == 2 * expected


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("side", [1, 2])
def test_a_sample_of_super_resolution_costs_what_pytorch_counts(
    build: Build, options: dict[str, Any], side: int
) -> None:
    real = build(**options, low_input=True)
    low_BRC, high_BRC = torch.randint(13, (2, 2, 2)), torch.randint(13, (2, 4, 4))
    with counted() as counter:
        prefixes = read_prefixes(real, [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
        upscale_loss(real, low_BRC, high_BRC, prefixes, side=side).backward()
    expected = FlopCount(meta_transformer(real.config)).train_text_to_image(caption=5, codes=16, low=5)
    assert counter.get_total_flops() == 2 * expected


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("side", "guidance"), [(1, 3.0), (2, 1.0)])
def test_upscaling_costs_what_pytorch_counts(build: Build, options: dict[str, Any], side: int, guidance: float) -> None:
    real = build(**options, low_input=True)
    asked = replace(request(5, guidance=guidance), grid=(4, 4), low=torch.randint(13, (2, 2)), side=side)
    with counted() as counter:
        draw(real, [asked])
    count = FlopCount(meta_transformer(real.config))
    assert counter.get_total_flops() == count.draw(prompt=5, codes=16, guided=guidance != 1, low=5, block=side**2)


Parts = list[tuple[Modality, int, int]]
TEXT, IMAGE = Modality.TEXT, Modality.IMAGE


@pytest.mark.parametrize("options", OPTIONS)
def test_a_document_costs_hardly_less_than_is_said(build: Build, options: dict[str, Any]) -> None:
    real = build(**options)
    image, text = ImagePart(codes_RC=torch.randint(13, (3, 4))), TextPart(ids=(4, 5, 6))
    source, instruction = replace(image, role="source"), replace(text, learned=False)
    documents: list[tuple[list[Part], Parts, float]] = [
        ([text, image], [(TEXT, 3, 0), (IMAGE, 12, 12)], 1.0),
        ([replace(image, role="read"), text], [(IMAGE, 13, 0), (TEXT, 4, 4)], 1.0),
        ([source, instruction, image], [(IMAGE, 13, 0), (TEXT, 4, 0), (IMAGE, 12, 12)], 0.75),
        ([text, image, text, image], [(TEXT, 3, 0), (IMAGE, 13, 12), (TEXT, 4, 3), (IMAGE, 12, 12)], 0.75),
    ]
    for document, parts, least in documents:
        with counted() as counter:
            states = interleaved_states(real, interleaved([document], real.vocabulary, end=2))
            tables = {"image": real.visual_table, "text": real.text_table}
            found = [(states[kind], table) for kind, table in tables.items() if kind in states]
            torch.stack([token_loss(one.states_ND, table, one.targets_N).loss for one, table in found]).sum().backward()
        said = FlopCount(meta_transformer(real.config)).train_document(parts)
        assert least * said <= counter.get_total_flops() <= said


def test_longer_prompts_and_more_codes_cost_more(build: Build) -> None:
    count = FlopCount(meta_transformer(build().config))
    base = count.draw(prompt=5, codes=12, guided=False)
    assert count.draw(prompt=6, codes=12, guided=False) > base
    assert count.draw(prompt=5, codes=13, guided=False) > base
    assert count.draw(prompt=5, codes=12, guided=False, low=5) > base
    assert count.draw(prompt=5, codes=12, guided=True) == 2 * base - 12 * count.image_head


def test_an_image_tokenizer_costs_what_pytorch_counts_on_real_pictures() -> None:
    codec = ImageTokenizer(CODEC)
    with counted() as encoding, torch.no_grad():
        codes_BRC = codec.encode(torch.rand(1, 3, 8, 12))
    with counted() as decoding, torch.no_grad():
        codec.decode(codes_BRC)
    assert image_tokenizer_flops(CODEC, grid=(4, 6)) == (encoding.get_total_flops(), decoding.get_total_flops())


def test_a_narrower_expert_and_fewer_layers_cost_less(build: Build) -> None:
    full = build().config
    narrow = replace(full, semvie=replace(full.semvie, **NARROW))
    few = replace(full, semvie=replace(full.semvie, visual_layers=(1,)))

    def flops(config: ModelConfig) -> int:
        return FlopCount(meta_transformer(config)).draw(prompt=5, codes=12, guided=False)

    assert flops(narrow) < flops(full)
    assert flops(few) < flops(full)
