"""Positions that hold cells of codes: read, predicted and drawn as a model without cells would, a position for each."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mars.errors import ConfigError, RequestError
from mars.generation.engine import draw, text_ids
from mars.generation.joint import Drew, WriteRequest, write
from mars.generation.request import DrawRequest
from mars.generation.sampling import Sampling
from mars.model.base_llm import open_base_llm
from mars.model.config import ModelConfig, SemVIEConfig
from mars.model.costs import FlopCount, meta_transformer
from mars.model.precision import Precision, lower_precision
from mars.model.starting import start_visual
from mars.model.transformer import MarsTransformer, build_transformer, read_prefixes
from mars.sequence.interleaved import ImagePart, Part, TextPart, interleaved
from mars.sequence.layout import drawn_image, read_image, text_segment
from mars.training.interleaved import interleaved_losses, interleaved_states
from mars.training.losses import captioning_loss, text_to_image_loss, text_to_image_states
from mars.training.upscale import upscale_loss, upscale_states

GRID = (4, 6)
SLOTS = 4
PROMPTS = [(1, 40, 41, 42, 43), (1, 50), (1, *range(70, 84))]
Build = Callable[..., MarsTransformer]


@pytest.fixture(scope="module")
def transformer(build_tiny: Build, pocket: dict[str, Any]) -> MarsTransformer:
    return build_tiny(**pocket, cell=2, cell_width=16, low_input=True)


def ask(prompt: Sequence[int], seed: int = 0, **options: Any) -> DrawRequest:
    names = DrawRequest.__dataclass_fields__.keys() & options.keys()
    given: dict[str, Any] = {"grid": GRID, "side": 2, "cell": 2} | {name: options.pop(name) for name in names}
    return DrawRequest(prompt=tuple(prompt), free=(1,), seed=seed, sampling=Sampling(**options), **given)


def codes_of(count: int, *, grid: tuple[int, int] = GRID) -> Tensor:
    return torch.randint(64, (count, *grid), generator=torch.Generator().manual_seed(count))


def test_each_state_hears_the_codes_before_it_in_its_cell_and_no_others(transformer: MarsTransformer) -> None:
    hidden, codes = torch.randn(2, 3, 24), torch.randint(64, (2, 3, SLOTS))
    states = transformer.visual_cells(hidden, codes)
    for slot in range(SLOTS):
        alone = transformer.next_state(hidden, [codes[..., before] for before in range(slot)])
        torch.testing.assert_close(alone, states[..., slot, :])
        other = codes.clone()
        other[..., slot] = (other[..., slot] + 1) % 64
        changed = (transformer.visual_cells(hidden, other) != states).any(dim=-1).any(dim=0).any(dim=0)
        assert changed.tolist() == [place > slot for place in range(SLOTS)]


def test_a_position_hears_where_each_code_of_a_cell_stands(transformer: MarsTransformer) -> None:
    codes = codes_of(1)
    swapped = codes.clone()
    swapped[0, 0, 0], swapped[0, 0, 1] = codes[0, 0, 1], codes[0, 0, 0]
    first, second = (transformer.embed(read_image(one, transformer.vocabulary)) for one in (codes, swapped))
    assert not torch.equal(first[:, 1], second[:, 1])
    assert torch.equal(first[:, 2:], second[:, 2:])


def test_greedy_drawing_is_the_full_pass_for_prompts_of_all_lengths_at_once(transformer: MarsTransformer) -> None:
    drawn = torch.stack(draw(transformer, [ask(prompt, temperature=0.0) for prompt in PROMPTS]))
    with torch.no_grad():
        states, targets = text_to_image_states(transformer, drawn, read_prefixes(transformer, PROMPTS))
        likeliest = transformer.visual_logits(states)[:, :64].argmax(dim=1)
    assert torch.equal(likeliest, targets)


def test_a_batch_of_n_is_n_singles_guided_or_not(transformer: MarsTransformer) -> None:
    asked = [
        ask(PROMPTS[0], 5),
        ask(PROMPTS[1], 6, guidance=3.0, candidates=2),
        ask(PROMPTS[2], 7, guidance=0.5, top_k=9, guidance_stop=0.4),
        ask(PROMPTS[1], 6, guidance=3.0, grid=(2, 4)),
    ]
    together = draw(transformer, asked)
    for one, request in zip(together, asked, strict=True):
        assert torch.equal(one, draw(transformer, [request])[0])
        assert tuple(one.shape) == request.grid


def test_guidance_of_1_is_no_guidance(transformer: MarsTransformer) -> None:
    plain = draw(transformer, [ask(PROMPTS[0], 3, guidance=1.0)])[0]
    assert torch.equal(plain, draw(transformer, [ask(PROMPTS[0], 3, guidance=1.0, guidance_stop=0.5)])[0])
    assert not torch.equal(plain, draw(transformer, [ask(PROMPTS[0], 3, guidance=4.0)])[0])


def test_codes_that_are_known_stay_inside_a_cell_too(transformer: MarsTransformer) -> None:
    known = torch.full(GRID, -1)
    known[0, 1], known[2:, :3] = 7, 9
    drawn = draw(transformer, [ask(PROMPTS[0], 2, known=known)])[0]
    assert torch.equal(drawn[known >= 0], known[known >= 0])


def test_a_smaller_image_is_refined_a_cell_for_each_of_its_codes(transformer: MarsTransformer) -> None:
    low, grid = codes_of(2, grid=(2, 4)), (4, 8)
    for side in (2, 4):
        asked = [
            ask(prompt, grid=grid, low=one, side=side, temperature=0.0)
            for prompt, one in zip(PROMPTS, low, strict=False)
        ]
        drawn = torch.stack(draw(transformer, asked))
        with torch.no_grad():
            states, targets = upscale_states(
                transformer, low, drawn, read_prefixes(transformer, PROMPTS[:2]), side=side
            )
            assert torch.equal(transformer.visual_logits(states)[:, :64].argmax(dim=1), targets)


def test_captions_hear_the_picture_and_writing_goes_on_after_one_that_was_drawn(transformer: MarsTransformer) -> None:
    ids = [list(text_ids(transformer, (69,), max_tokens=5, end=(), image=one)) for one in codes_of(2)]
    assert ids[0] != ids[1]
    with torch.no_grad():
        transformer.special_head.weight[0] = 2.0 * transformer.text_table.mean(dim=0)
    request = WriteRequest(parts=[TextPart(ids=PROMPTS[0])], end=(), grid=GRID, free=(1,), max_tokens=6, max_images=1)
    events = list(write(transformer, request))
    assert all(event.codes.shape == GRID for event in events if isinstance(event, Drew))


def test_every_loss_trains_the_cells_and_leaves_the_language_expert_alone(transformer: MarsTransformer) -> None:
    prefixes = read_prefixes(transformer, PROMPTS[:2])
    document: list[Part] = [TextPart(ids=(1, 40)), ImagePart(codes_RC=codes_of(1)[0]), TextPart(ids=(41, 42))]
    segments = interleaved([document], transformer.vocabulary, end=2)
    losses = {
        "text to image": text_to_image_loss(transformer, codes_of(2), prefixes),
        "upscale": upscale_loss(transformer, codes_of(2, grid=(2, 4)), codes_of(2, grid=(4, 8)), prefixes, side=2),
        "interleaved": interleaved_losses(transformer, segments)["total"],
    }
    for name, loss in losses.items():
        transformer.zero_grad()
        loss.backward()
        moved = {name for name, one in transformer.named_parameters() if one.grad is not None and bool(one.grad.any())}
        assert moved <= transformer.visual_tensors().keys(), name
        assert {one for one in transformer.visual_tensors() if one.startswith("visual_cells.")} <= moved, name


def test_a_drawn_image_inside_a_document_is_predicted_as_alone(transformer: MarsTransformer) -> None:
    document: list[Part] = [TextPart(ids=(1, 40)), ImagePart(codes_RC=codes_of(1)[0]), TextPart(ids=(41, 42))]
    states = interleaved_states(transformer, interleaved([document], transformer.vocabulary, end=2))["image"]
    alone, targets = text_to_image_states(transformer, codes_of(1), read_prefixes(transformer, [(1, 40)]))
    assert torch.equal(states.targets_N, targets)
    torch.testing.assert_close(states.states_ND, alone)


def test_costs_are_what_pytorch_counts(transformer: MarsTransformer) -> None:
    count, prefixes = FlopCount(meta_transformer(transformer.config)), [(1, 2, 3, 4, 5), (5, 4, 3, 2, 1)]
    found = {}
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            draw(transformer, [replace(ask((1, 2, 3, 4, 5), guidance=3.0), free=(5, 4, 3, 2, 1))])
        found["draw"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            text_to_image_loss(transformer, codes_of(2), read_prefixes(transformer, prefixes)).backward()
        found["text to image"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            captioning_loss(transformer, codes_of(2), prefixes, hints=[[], []], end=2).backward()
        found["captioning"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            low, high = codes_of(2, grid=(2, 2)), codes_of(2, grid=(4, 4))
            upscale_loss(transformer, low, high, read_prefixes(transformer, prefixes), side=2).backward()
        found["upscale"] = counter.get_total_flops()
    assert found["draw"] == count.draw(prompt=5, codes=24, guided=True)
    assert found["text to image"] == 2 * count.train_text_to_image(caption=5, codes=24)
    assert found["captioning"] == 2 * count.train_captioning(caption=5, codes=24)
    assert found["upscale"] == 2 * count.train_text_to_image(caption=5, codes=16, low=2)


@pytest.mark.parametrize(("precision", "error"), [("fp16", 0.01), ("int8", 0.1), ("int4", 0.8)])
def test_models_of_fewer_bits_predict_nearly_the_same(even_llm: Path, precision: Precision, error: float) -> None:
    llm = open_base_llm(str(even_llm))
    options = SemVIEConfig(share_norms=False, visual_width=64, visual_ffn=64, init="random", cell=2, cell_width=32)
    transformer = build_transformer(ModelConfig(language=llm.config, semvie=options, num_codes=64), llm.tensors).eval()
    start_visual(transformer, generator=torch.Generator().manual_seed(0), codebook_VZ=torch.randn(64, 5))

    @torch.no_grad()
    def logits() -> Tensor:
        cache = transformer.new_cache()
        transformer(text_segment([PROMPTS[0]]), cache)
        segment = drawn_image(codes_of(1), transformer.vocabulary)
        assert segment.targets is not None
        return transformer.visual_logits(transformer.code_states(transformer(segment, cache), segment.targets))

    exact = logits()
    lower_precision(transformer, precision)
    assert float((logits() - exact).norm() / exact.norm()) < error
    assert draw(transformer, [ask(PROMPTS[0])])[0].shape == GRID


def test_what_cannot_be_is_one_line(transformer: MarsTransformer) -> None:
    with pytest.raises(ConfigError, match="cell above 1 has no rows that could be copied"):
        ModelConfig(language=transformer.config.language, semvie=SemVIEConfig(cell=2), num_codes=64)
    with pytest.raises(ConfigError, match="must fill the grid, got 3x4"):
        drawn_image(codes_of(1, grid=(3, 4)), transformer.vocabulary)
    with pytest.raises(ConfigError, match="refine one code each, got a scale of 1"):
        upscale_states(transformer, codes_of(1), codes_of(1), read_prefixes(transformer, PROMPTS[:1]), side=2)
    for wrong, said in (
        ({"side": 1, "cell": 1}, "cell must be the model's, 2, got 1"),
        ({"window": 4}, "window must be 1"),
        ({"low": codes_of(1, grid=(4, 4))[0], "grid": (12, 12)}, "refine one code each, got 4x4 codes for 12x12"),
        ({"low": codes_of(1, grid=(3, 3))[0], "grid": (6, 6)}, "fill what is refined"),
    ):
        with pytest.raises(RequestError, match=said):
            draw(transformer, [ask(PROMPTS[0], **wrong)])
    request = WriteRequest(
        parts=[TextPart(ids=(1, 40))], end=(), grid=GRID, free=(1,), max_tokens=2, drawing=Sampling(window=2)
    )
    with pytest.raises(RequestError, match="window must be 1 where a step draws several codes, got 2"):
        next(write(transformer, request))
    with pytest.raises(ConfigError, match="cells of 2x2 codes must fill the grid, got 3x4"):
        transformer.config.semvie.check_grid(3, 4)
    with pytest.raises(ConfigError, match="max_grid must be at least 5 for codes of 4x10, got 4"):
        transformer.config.semvie.check_grid(4, 10)
    with pytest.raises(ConfigError, match="whole cells of 2x2 codes, got 3x3"):
        draw(transformer, [ask(PROMPTS[0], side=3)])


def test_a_start_draws_anything_and_hears_nothing_yet_of_a_cell(build_tiny: Build, pocket: dict[str, Any]) -> None:
    transformer = build_tiny(**pocket, cell=2, cell_width=16)
    start_visual(transformer, generator=torch.Generator().manual_seed(0), codebook_VZ=torch.randn(64, 5))
    cache = transformer.new_cache()
    with torch.no_grad():
        transformer(text_segment([[1, 40]]), cache)
        segment = drawn_image(codes_of(1), transformer.vocabulary)
        assert segment.targets is not None
        states = transformer.code_states(transformer(segment, cache), segment.targets)
    assert bool(states.isfinite().all())
    silent = [weight for name, weight in transformer.visual_cells.named_parameters() if "down_proj" in name]
    assert silent
    assert not any(weight.any() for weight in silent)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
def test_a_compiled_head_gives_the_same_gradients(build_tiny: Build, pocket: dict[str, Any]) -> None:
    gradients = []
    for compiled in (False, True):
        transformer = build_tiny(**pocket, cell=2, cell_width=16)
        if compiled:
            transformer.compile_layers()
        for count in (2, 3):
            text_to_image_loss(transformer, codes_of(count), read_prefixes(transformer, PROMPTS[:count])).backward()
        gradients.append([weight.grad for weight in transformer.visual_cells.parameters()])
    assert all(one is not None and bool(one.any()) for one in gradients[0])
    for plain, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-5)
