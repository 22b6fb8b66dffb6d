import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mars.errors import ConfigError
from mars.model.config import LanguageConfig, ModelConfig, SemVIEConfig
from mars.model.language_tensors import hub_name, language_shapes
from mars.model.semvie import SemVIELayer
from mars.model.starting import start_visual
from mars.model.transformer import MarsTransformer, build_transformer, is_language
from mars.sequence.layout import (
    IGNORE,
    Modality,
    Segment,
    drawn_image,
    low_image,
    read_image,
    refined_codes,
    text_segment,
    upscaled_image,
    written_text,
)

Build = Callable[..., MarsTransformer]


@pytest.fixture(scope="session")
def transformers() -> Iterator[ModuleType]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        yield transformers


def hub_twin(transformers: ModuleType, architecture: str, ours: MarsTransformer) -> Any:
    """The same language model, as the hub's library builds it."""
    language = ours.config.language
    shape: dict[str, Any] = {
        "vocab_size": language.vocab_size,
        "hidden_size": language.width,
        "intermediate_size": language.ffn,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "rms_norm_eps": language.norm_eps,
        "rope_theta": language.rope_theta,
        "max_position_embeddings": language.max_positions,
        "tie_word_embeddings": language.tied_embeddings,
        "attn_implementation": "eager",
    }
    if architecture != "Qwen2":
        shape["head_dim"] = language.head_width
    model = getattr(transformers, f"{architecture}ForCausalLM")(getattr(transformers, f"{architecture}Config")(**shape))
    state = {hub_name(name): tensor for name, tensor in ours.language_tensors().items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if language.tied_embeddings else [], [])
    if language.tied_embeddings:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    return model.eval()


@pytest.mark.parametrize(
    ("architecture", "language"),
    [
        ("Llama", {}),
        ("Llama", {"tied_embeddings": False, "rope_theta": 5e5, "norm_eps": 1e-3, "head_width": 12, "num_kv_heads": 4}),
        ("Qwen2", {"qkv_bias": True, "rope_theta": 1e6}),
        ("Qwen3", {"qk_norm": True, "head_width": 16, "tied_embeddings": False}),
    ],
)
@pytest.mark.parametrize("options", [{}, {"visual_layers": (1,), "share_norms": False, "grid_embedding": True}])
@torch.no_grad()
def test_text_alone_is_the_language_model_whatever_the_visual_expert_holds(
    transformers: ModuleType, build: Build, architecture: str, language: dict[str, Any], options: dict[str, Any]
) -> None:
    ours = build(language=language, **options)
    for weight in ours.visual_tensors().values():
        weight.fill_(torch.nan)
    rows = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [20, 0, 19], [7]]
    found = ours.text_logits(ours(text_segment(rows), ours.new_cache()))
    twin = hub_twin(transformers, architecture, ours)
    for row, ids in enumerate(rows):
        wanted = twin(torch.tensor([ids])).logits
        assert (found[row : row + 1, : len(ids)] - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_frozen_or_trained(build: Build, tied: bool) -> None:
    transformer = build(language={"tied_embeddings": tied}, share_norms=False, grid_embedding=True)
    frozen, trained = transformer.language_tensors(), transformer.visual_tensors()
    assert (
        frozen.keys() | trained.keys() == dict(transformer.named_parameters()).keys() == transformer.state_dict().keys()
    )
    assert not frozen.keys() & trained.keys()
    assert all(is_language(name) and not weight.requires_grad for name, weight in frozen.items())
    assert all(weight.requires_grad and torch.isfinite(weight).all() for weight in trained.values())
    assert ("language_head.weight" in frozen) is not tied
    assert {
        "special_embedding.weight",
        "special_head.weight",
        "visual_grid.rows",
        "visual_norm.weight",
    } <= trained.keys()


def test_the_visual_tables_have_a_row_per_code_special_and_dead_id(build: Build) -> None:
    transformer = build()
    assert transformer.vocabulary.size == 40  # 21 text ids, 13 codes, 6 specials, none dead
    assert transformer.visual_embedding.weight.shape == transformer.visual_head.weight.shape == (19, 32)
    assert transformer.special_embedding.weight.shape == transformer.special_head.weight.shape == (6, 32)


def draw_loss(transformer: MarsTransformer) -> Tensor:
    cache = transformer.new_cache()
    transformer(text_segment([[3, 1, 4], [5]]), cache)
    segment = drawn_image(torch.randint(13, (2, 2, 3)), transformer.vocabulary)
    assert segment.targets is not None
    logits = transformer.visual_logits(transformer(segment, cache))
    return F.cross_entropy(logits.flatten(0, 1), segment.targets.flatten() - transformer.vocabulary.first_code)


def caption_loss(transformer: MarsTransformer) -> Tensor:
    cache = transformer.new_cache()
    transformer(read_image(torch.randint(13, (2, 2, 3)), transformer.vocabulary), cache)
    segment = written_text([[3, 1, 4], [5]], transformer.vocabulary, hints=[[7], [8, 9]], end=0)
    assert segment.targets is not None
    logits = transformer.text_logits(transformer(segment, cache))
    return F.cross_entropy(logits.flatten(0, 1), segment.targets.flatten(), ignore_index=IGNORE)


@pytest.mark.parametrize("loss", [draw_loss, caption_loss])
@pytest.mark.parametrize("options", [{}, {"visual_layers": (0, 1), "share_norms": False, "grid_embedding": True}])
def test_training_moves_the_visual_side_and_no_language_tensor(
    build: Build, loss: Callable[[MarsTransformer], Tensor], options: dict[str, Any]
) -> None:
    transformer = build(**options)
    before = {name: weight.clone() for name, weight in transformer.language_tensors().items()}
    optimizer = torch.optim.AdamW([w for w in transformer.parameters() if w.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        torch.manual_seed(0)
        optimizer.zero_grad()
        value = loss(transformer)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    for name, weight in transformer.language_tensors().items():
        assert weight.grad is None, name
        assert torch.equal(weight, before[name]), name


def test_drawing_reaches_the_whole_visual_side(build: Build) -> None:
    transformer = build(share_norms=False, grid_embedding=True)
    draw_loss(transformer).backward()
    silent = {name for name, weight in transformer.visual_tensors().items() if weight.grad is None}
    assert silent == {"special_embedding.weight", "special_head.weight"}  # `<img>` is an image id
    for name, weight in transformer.visual_tensors().items():
        if name not in silent:
            assert weight.grad is not None
            assert weight.grad.abs().max() > 0, name


def test_captioning_reaches_the_visual_expert_through_the_frozen_layers(build: Build) -> None:
    transformer = build()
    caption_loss(transformer).backward()
    reached = {
        name for name, w in transformer.visual_tensors().items() if w.grad is not None and w.grad.abs().max() > 0
    }
    for layer in range(3):
        assert {f"layers.{layer}.visual.k_proj.weight", f"layers.{layer}.visual.v_proj.weight"} <= reached
    assert {"visual_embedding.weight", "special_embedding.weight", "layers.1.visual.down_proj.weight"} <= reached
    # What follows the last layer's keys and values at image positions can have no effect on text.
    assert "layers.2.visual.down_proj.weight" not in reached
    assert not {"visual_head.weight", "special_head.weight"} & reached


@pytest.mark.parametrize("language", [{}, {"qkv_bias": True}, {"qk_norm": True}])
@pytest.mark.parametrize("options", [{}, {"share_norms": False}, {"duplicate_output": False}, {"grid_embedding": True}])
@torch.no_grad()
def test_a_copied_expert_starts_as_the_language_model(
    build: Build, language: dict[str, Any], options: dict[str, Any]
) -> None:
    transformer = build(start=True, language=language, **options)
    words = torch.tensor([[3, 1, 4, 1]])
    codes = words % 13
    transformer.visual_embedding.weight[codes] = transformer.language_embedding.weight[words]
    images = Segment(modality=Modality.IMAGE, ids=codes + transformer.vocabulary.first_code, columns=2)
    found: list[Tensor] = []
    wanted: list[Tensor] = []
    for segment, states in ((images, found), (Segment(modality=Modality.TEXT, ids=words), wanted)):
        cache = transformer.new_cache()
        transformer(text_segment([[7, 8]]), cache)
        states += [transformer(segment, cache), transformer(text_segment([[9]]), cache)]
    torch.testing.assert_close(torch.cat(found, dim=1), torch.cat(wanted, dim=1))


@torch.no_grad()
def test_a_random_expert_starts_silent(build: Build) -> None:
    transformer = build(start=True, share_norms=False, init="random", visual_width=16, visual_ffn=8)
    image = drawn_image(torch.randint(13, (1, 2, 2)), transformer.vocabulary)
    hidden = transformer(image, transformer.new_cache())
    torch.testing.assert_close(hidden, transformer.visual_norm(transformer.embed(image)))


@torch.no_grad()
def test_tables_start_around_the_mean_of_the_text_embeddings(build: Build) -> None:
    transformer = build(start=True)
    text = transformer.language_embedding.weight
    for table in (transformer.visual_embedding.weight, transformer.visual_head.weight, transformer.special_head.weight):
        noise = (table - text.mean(dim=0)) / text.std()
        assert 0.015 < float(noise.std()) < 0.025
        assert not torch.equal(table[0], table[1])


def test_a_start_depends_on_its_generator_only(build: Build) -> None:
    first = build(start=True, share_norms=False, init="random", visual_ffn=8, grid_embedding=True)
    torch.rand(5)
    again = build(start=True, share_norms=False, init="random", visual_ffn=8, grid_embedding=True)
    for name, weight in first.visual_tensors().items():
        assert torch.equal(weight, again.visual_tensors()[name]), name


@torch.no_grad()
def test_special_ids_in_text_take_their_own_rows(build: Build) -> None:
    transformer = build()
    end = transformer.vocabulary.image_end
    embedded = transformer.embed(text_segment([[3, end, 20]]))
    wanted = [transformer.language_embedding.weight[3], transformer.special_embedding.weight[1]]
    assert torch.equal(embedded[0], torch.stack([*wanted, transformer.language_embedding.weight[20]]))


@torch.no_grad()
def test_the_grid_says_row_and_column_of_the_code_that_a_position_predicts(build: Build) -> None:
    transformer, plain = build(grid_embedding=True), build()
    codes = torch.randint(13, (1, 2, 3))
    whole = drawn_image(codes, transformer.vocabulary)
    for segment, start in ((whole, 0), (replace(whole, ids=whole.ids[:, 4:], start=4), 4)):
        embedded = transformer.embed(segment)
        for at in range(segment.ids.shape[1]):
            row, column = divmod(start + at, 3)
            id_row = transformer.visual_embedding.weight[segment.ids[0, at] - transformer.vocabulary.first_code]
            wanted = id_row + transformer.visual_grid["rows"][row] + transformer.visual_grid["columns"][column]
            torch.testing.assert_close(embedded[0, at], wanted)
    assert not hasattr(plain, "visual_grid")


def test_positions_before_and_after_inference_can_be_trained(build: Build) -> None:
    transformer = build()
    with torch.inference_mode():
        transformer(text_segment([[1, 2, 3]]), transformer.new_static_cache(batch=1, size=8))
    draw_loss(transformer).backward()


@torch.no_grad()
def test_the_pieces_are_named_as_checkpoints_name_them(build: Build) -> None:
    names = build(language={"tied_embeddings": False}).state_dict().keys()
    assert {"language_embedding.weight", "language_norm.weight", "language_head.weight", "visual_head.weight"} <= names
    assert {"layers.0.language.q_proj.weight", "layers.2.visual.down_proj.weight"} <= names


@torch.no_grad()
def test_head_norms_start_at_the_scale_of_text(build: Build) -> None:
    transformer = build(start=True, head_norms=True, init="random", share_norms=False)
    cache = transformer.new_cache()
    transformer(text_segment([list(range(1, 17))] * 2), cache)
    for index, layer in enumerate(transformer.layers):
        assert isinstance(layer, SemVIELayer)
        assert layer.visual is not None
        values = cache.values[index]
        assert values is not None
        size = float(values.square().mean().sqrt())
        images = layer.visual.v_norm(torch.randn(50, transformer.config.language.head_width))
        assert 0.5 * size < float(images.square().mean().sqrt()) < 2 * size


def test_head_norms_cannot_be_copied() -> None:
    language = LanguageConfig(
        vocab_size=8, width=8, num_layers=1, num_heads=2, num_kv_heads=1, head_width=4, ffn=8, rope_theta=1e4,
        norm_eps=1e-5, max_positions=16, tied_embeddings=True,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="set init = 'random'"):
        ModelConfig(language=language, semvie=SemVIEConfig(head_norms=True))


UPSCALING = [{}, {"share_norms": False, "visual_layers": (0, 2), "grid_embedding": True, "max_grid": 8}]


def logits_after(transformer: MarsTransformer, *segments: Segment) -> Tensor:
    """Visual logits of the last segment, after a text and the others."""
    cache = transformer.new_cache()
    for segment in (text_segment([[3, 1, 4], [5]]), *segments):
        hidden = transformer(segment, cache)
    return transformer.visual_logits(hidden)


@pytest.mark.parametrize("options", UPSCALING, ids=str)
@torch.no_grad()
def test_blocks_of_one_code_are_next_token_prediction_to_the_bit(
    build: Build, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer = build(**options, low_input=True)
    low, high = torch.randint(13, (2, 2, 4)), torch.randint(13, (2, 4, 8))
    seen = low_image(low, transformer.vocabulary)
    found = logits_after(transformer, seen, upscaled_image(low, high, transformer.vocabulary, side=1))
    added = transformer.low_projection(transformer.visual_embedding(refined_codes(low, grid=(4, 8)).flatten(1)))
    assert bool(added.any())
    plain = MarsTransformer.embed
    monkeypatch.setattr(
        transformer, "embed", lambda one: plain(transformer, one) + (added if one.targets is not None else 0)
    )
    assert torch.equal(found, logits_after(transformer, seen, drawn_image(high, transformer.vocabulary)))


@pytest.mark.parametrize("options", UPSCALING, ids=str)
@torch.no_grad()
def test_with_low_codes_unheard_blocks_of_one_code_are_text_to_image_to_the_bit(
    build: Build, options: dict[str, Any]
) -> None:
    low, high = torch.randint(13, (2, 2, 4)), torch.randint(13, (2, 4, 8))
    started, plain = build(start=True, **options, low_input=True), build(start=True, **options)
    assert not bool(started.low_projection.weight.any())
    names = started.state_dict().keys() - {"low_projection.weight"}
    assert names == plain.state_dict().keys()
    assert all(torch.equal(started.state_dict()[name], plain.state_dict()[name]) for name in names)
    found = logits_after(started, upscaled_image(low, high, started.vocabulary, side=1))
    assert torch.equal(found, logits_after(plain, drawn_image(high, plain.vocabulary)))


@torch.no_grad()
def test_the_low_code_that_a_position_refines_is_added_to_its_input(build: Build) -> None:
    transformer = build(grid_embedding=True, low_input=True)
    low, high = torch.randint(13, (1, 2, 2)), torch.randint(13, (1, 4, 4))
    drawn = upscaled_image(low, high, transformer.vocabulary, side=2)
    embedded = transformer.embed(drawn)
    for number in range(16):
        row, column = int(drawn.places()[0][number]), int(drawn.places()[1][number])
        wanted = transformer.visual_embedding.weight[drawn.ids[0, number] - transformer.vocabulary.first_code]
        wanted = wanted + transformer.visual_grid["rows"][row] + transformer.visual_grid["columns"][column]
        code = transformer.visual_embedding.weight[low[0, row // 2, column // 2]]
        torch.testing.assert_close(embedded[0, number], wanted + transformer.low_projection.weight @ code)


@pytest.mark.parametrize("options", ["paper", "pocket"])
def test_activations_that_are_computed_again_change_no_gradient_by_a_bit(
    build_tiny: Build, pocket: dict[str, Any], options: str
) -> None:
    transformer = build_tiny(**(pocket if options == "pocket" else {}))
    for loss in (draw_loss, caption_loss):
        gradients = []
        for recompute in (False, True):
            transformer.recompute = recompute
            transformer.zero_grad()
            torch.manual_seed(0)  # the losses draw their codes
            loss(transformer).backward()
            gradients.append({name: weight.grad for name, weight in transformer.visual_tensors().items()})
        for name, gradient in gradients[0].items():
            again = gradients[1][name]
            assert (gradient is None) == (again is None)
            if gradient is not None and again is not None:
                assert torch.equal(gradient, again)


def test_activations_that_are_computed_again_take_less_memory(peak: Callable[[Callable[[], object]], int]) -> None:
    language = LanguageConfig(
        vocab_size=16, width=32, num_layers=6, num_heads=2, num_kv_heads=2, head_width=16, ffn=1024, rope_theta=1e4,
        norm_eps=1e-5, max_positions=512, tied_embeddings=True,
    )  # fmt: skip
    weights = {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in language_shapes(language).items()}
    transformer = build_transformer(ModelConfig(language=language, num_codes=64), weights)
    start_visual(transformer, generator=torch.Generator().manual_seed(0))
    codes = torch.randint(64, (16, 16, 16))

    def learn() -> None:
        segment = drawn_image(codes, transformer.vocabulary)
        transformer(segment, transformer.new_cache()).square().mean().backward()

    learn()
    held = {}
    for recompute in (False, True):
        transformer.recompute = recompute
        held[recompute] = peak(learn)
    assert held[True] < 0.5 * held[False]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
def test_compiled_layers_give_the_same_gradients(build_tiny: Build, pocket: dict[str, Any]) -> None:
    plain, compiled = build_tiny(**pocket), build_tiny(**pocket)
    compiled.compile_layers()
    for recompute in (False, True):
        compiled.recompute = recompute
        for loss in (draw_loss, caption_loss):
            for transformer in (plain, compiled):
                transformer.zero_grad()
                torch.manual_seed(0)
                loss(transformer).backward()
            for name, weight in plain.visual_tensors().items():
                found = compiled.visual_tensors()[name].grad
                wanted = torch.zeros_like(weight) if weight.grad is None else weight.grad  # the compiler fills in zeros
                torch.testing.assert_close(wanted if found is None else found, wanted, rtol=1e-3, atol=1e-5)
