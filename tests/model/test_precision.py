import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from mars import memory
from mars.errors import ConfigError, ModelError, RequestError
from mars.model.config import LanguageConfig, ModelConfig, SemVIEConfig
from mars.model.language_tensors import language_shapes
from mars.model.precision import (
    Precision,
    bytes_needed,
    check_model_memory,
    lower_precision,
    replace_weights,
    weights_held,
)
from mars.model.starting import start_visual
from mars.model.transformer import MarsTransformer, build_transformer, read_prefixes
from mars.sequence.layout import Modality, Segment, text_segment

LOWER: tuple[Precision, ...] = ("int8", "int4")
Build = Callable[..., MarsTransformer]


@pytest.fixture
def build() -> Build:
    """A small transformer whose widths 8 and 4 bits divide; the same weights each time."""

    def made(*, tied: bool = True, width: int = 64, **semvie: Any) -> MarsTransformer:
        language = LanguageConfig(
            vocab_size=96, width=width, num_layers=2, num_heads=4, num_kv_heads=2, head_width=16, ffn=128,
            rope_theta=1e4, norm_eps=1e-5, max_positions=64, tied_embeddings=tied,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        weights = {
            name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 if len(shape) > 1 else torch.ones(shape)
            for name, shape in language_shapes(language).items()
        }
        config = ModelConfig(language=language, semvie=SemVIEConfig(**semvie), num_codes=26)
        transformer = build_transformer(config, weights)
        start_visual(transformer, generator=generator)
        return transformer

    return made


@torch.inference_mode()
def outputs(transformer: MarsTransformer) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a text, and of an image after it."""
    cache = transformer.new_static_cache(batch=2, size=24)
    text = transformer(text_segment([[1, 5, 9, 30], [1, 7]]), cache)
    codes = torch.arange(12).view(2, 6) + transformer.vocabulary.first_code
    image = transformer(Segment(modality=Modality.IMAGE, ids=codes, columns=3, start=1), cache)
    return transformer.text_logits(text), transformer.visual_logits(image)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", LOWER)
def test_rounded_weights_give_nearly_the_same_logits(build: Build, precision: Precision, tied: bool) -> None:
    transformer = build(tied=tied)
    wanted = outputs(transformer)
    lower_precision(transformer, precision)
    for one, other in zip(outputs(transformer), wanted, strict=True):
        assert one.dtype is torch.float32
        assert float((one - other).norm() / other.norm()) < (0.03 if precision == "int8" else 0.35)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", LOWER)
def test_the_bytes_are_known_before_there_are_weights(build: Build, precision: Precision, tied: bool) -> None:
    transformer = build(tied=tied)
    with torch.device("meta"):
        shapes = MarsTransformer(transformer.config)
    wanted, visual = bytes_needed(shapes, precision), bytes_needed(shapes, "fp32")
    assert visual == weights_held(transformer)["visual"][1]
    lower_precision(transformer, precision)
    held = sum(size for _, size in weights_held(transformer).values())
    assert wanted <= held < 1.05 * wanted  # tiles of 16 outputs are filled up


@pytest.mark.parametrize(
    ("precision", "advice"),
    [
        ("fp32", "open it with precision int8 or int4, or close"),
        ("int8", "open it with precision int4, or close"),
        ("int4", "close"),
    ],
)
def test_a_model_that_will_not_fit_says_what_to_do(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision, advice: str
) -> None:
    (tmp_path / "meminfo").write_text("MemAvailable: 1000000 kB")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    check_model_memory(build(), 10**9, name="tiny", precision=precision)
    with pytest.raises(ModelError, match=rf"^tiny in {precision} needs 3.0 GB of memory, 1.0 GB are free; {advice}"):
        check_model_memory(build(), 3 * 10**9, name="tiny", precision=precision)


@pytest.mark.parametrize("precision", LOWER)
def test_a_head_that_was_the_table_is_counted_once(build: Build, precision: Precision) -> None:
    transformer = build(tied=True)
    before = {part: count for part, (count, _) in weights_held(transformer).items()}
    lower_precision(transformer, precision)
    assert {part: count for part, (count, _) in weights_held(transformer).items()} == before


@pytest.mark.parametrize("precision", LOWER)
def test_it_takes_the_bytes_that_it_says(build: Build, precision: Precision) -> None:
    transformer = build(tied=False)
    before = weights_held(transformer)
    assert before["language"][1] == 4 * sum(weight.numel() for weight in transformer.language_tensors().values())
    assert before["visual"][1] == 4 * sum(weight.numel() for weight in transformer.visual_tensors().values())
    lower_precision(transformer, precision)
    after = weights_held(transformer)
    assert {part: count for part, (count, _) in after.items()} == {part: count for part, (count, _) in before.items()}
    assert after["language"][1] < before["language"][1] * (0.32 if precision == "int8" else 0.22)


@pytest.mark.parametrize("precision", get_args(Precision))
def test_other_weights_take_their_places_one_after_the_other(build: Build, precision: Precision) -> None:
    """As if they had always been there; with 8 or 4 bits none is whole any more when the next one is made."""
    wanted, transformer = build(), build()
    other = {name: -weight for name, weight in wanted.visual_tensors().items() if name.endswith("_proj.weight")}
    for name, weight in other.items():
        wanted.get_parameter(name).data.copy_(weight)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        before: weakref.ref[torch.Tensor] = weakref.ref(torch.empty(0))
        for name, weight in other.items():
            assert before() is None
            made = weight.clone()
            before = weakref.ref(made)
            yield name, made
            del made

    replace_weights(transformer, weights(), precision)
    for one in (wanted, transformer):
        lower_precision(one, precision)
    for found, right in zip(outputs(transformer), outputs(wanted), strict=True):
        assert torch.equal(found, right)


def test_fp32_changes_nothing(build: Build) -> None:
    transformer = build()
    wanted = {name: weight.clone() for name, weight in transformer.named_parameters()}
    lower_precision(transformer, "fp32")
    assert all(torch.equal(weight, wanted[name]) for name, weight in transformer.named_parameters())


def test_tables_of_sixteen_bits_stay_what_they_are(build: Build) -> None:
    transformer = build()
    transformer.language_embedding.weight.data = transformer.language_embedding.weight.data.bfloat16()
    lower_precision(transformer, "int8")
    assert transformer.language_embedding.weight.dtype is torch.bfloat16
    assert transformer.visual_embedding.weight.dtype is torch.float16


def test_an_unknown_precision_and_a_width_that_does_not_fit_are_one_line(build: Build) -> None:
    with pytest.raises(ConfigError, match="fp32, fp16, int8, int4, got 'int2'"):
        lower_precision(build(), "int2")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="multiple of 32 inputs, got 72"):
        lower_precision(build(width=72), "int4")
    weights = [("layers.1.visual.q_proj.weight", torch.zeros(64, 72))]
    with pytest.raises(ModelError, match=r"model\.layers\.1\.visual\.q_proj: .* multiple of 32 inputs, got 72"):
        replace_weights(build(width=72), weights, "int8")


@pytest.mark.parametrize(
    "semvie",
    [
        {},
        {"share_norms": False, "visual_width": 32, "visual_ffn": 64, "init": "random"},
        {"duplicate_output": False},
        {"share_norms": False, "init": "random", "head_norms": True},
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_images_never_read_the_language_expert(build: Build, semvie: dict[str, Any], precision: Precision) -> None:
    transformer = build(**semvie)
    lower_precision(transformer, precision)
    with torch.inference_mode():
        prefix = read_prefixes(transformer, [[1, 4, 6]])
        segment = Segment(modality=Modality.IMAGE, ids=torch.tensor([[transformer.vocabulary.image_start]]), columns=2)
        found = []
        for release in (False, True):
            if release:
                transformer.release_language()
            cache = transformer.new_static_cache(batch=1, size=8, images_only=True)
            cache.load(prefix)
            found.append(transformer.visual_logits(transformer(segment, cache)))
    assert torch.equal(*found)
    assert weights_held(transformer)["language"][1] < 64 * 64 * 3 * 4
    with pytest.raises(RequestError, match="released"):
        transformer(text_segment([[1]]), transformer.new_cache())
