from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mars.errors import ConfigError, RequestError
from mars.generation import scheduler
from mars.generation.engine import Progress, draw
from mars.generation.request import SEED_STRIDE, DrawRequest
from mars.generation.sampling import Sampling
from mars.model.transformer import MarsTransformer
from mars.sequence.layout import drawn_image, low_image, text_segment, upscaled_image

HIGH = (4, 8)
PROMPTS = [(1, 40, 41, 42, 43, 44), (1, 50), (1, 60, 61, 62)]
LOWS = torch.arange(24).view(3, 2, 4) * 2
FREE = (1,)

every_side = pytest.mark.parametrize("side", [1, 2, 4], ids=["K=1", "K=4", "K=16"])


@pytest.fixture(scope="module", params=["paper", "pocket"])
def transformer(
    request: pytest.FixtureRequest, build_tiny: Callable[..., MarsTransformer], pocket: dict[str, Any]
) -> MarsTransformer:
    options = {**pocket, "max_grid": 8} if request.param == "pocket" else {}
    return build_tiny(**options, low_input=True)


def ask(number: int, seed: int = 0, **sampling: Any) -> DrawRequest:
    return DrawRequest(
        prompt=PROMPTS[number], free=FREE, grid=HIGH, seed=seed, sampling=Sampling(**sampling), low=LOWS[number]
    )  # fmt: skip


def upscale(
    transformer: MarsTransformer, requests: Sequence[DrawRequest], *, side: int, progress: Progress | None = None
) -> Tensor:
    return torch.stack(draw(transformer, [replace(one, side=side) for one in requests], progress=progress))


MIXED = [
    ask(0, 5),
    ask(1, 6, guidance=3.0),
    ask(2, 7, guidance=0.5, top_k=9),
    ask(2, 8, guidance=2.0, top_p=0.9, temperature=1.3),
    ask(1, 6, guidance=3.0),
]


def full_logits(
    transformer: MarsTransformer, prompt: Sequence[int], low: Tensor | None, codes: Tensor, side: int
) -> tuple[Tensor, Tensor]:
    """Logits of all codes by one pass over the whole sequence, (N, codes), and the codes in the order of drawing."""
    assert low is not None
    cache, vocabulary = transformer.new_cache(), transformer.vocabulary
    with torch.no_grad():
        transformer(text_segment([prompt]), cache)
        transformer(low_image(low[None], vocabulary), cache)
        drawn = upscaled_image(low[None], codes[None], vocabulary, side=side)
        assert drawn.targets is not None
        logits = transformer.visual_logits(transformer(drawn, cache))[0, :, : vocabulary.num_codes]
    return logits, drawn.targets[0] - vocabulary.first_code


@every_side
def test_greedy_codes_are_those_of_the_full_pass_at_every_place(transformer: MarsTransformer, side: int) -> None:
    requests = [ask(number, temperature=0) for number in range(3)]
    found = upscale(transformer, requests, side=side)
    assert found.shape == (3, *HIGH)
    for request, codes in zip(requests, found, strict=True):
        logits, drawn = full_logits(transformer, request.prompt, request.low, codes, side)
        assert logits.argmax(dim=1).tolist() == drawn.tolist()
        assert len(set(drawn.tolist())) > 2


@every_side
def test_guided_codes_are_those_of_two_full_passes(transformer: MarsTransformer, side: int) -> None:
    requests = [ask(number, temperature=0, guidance=4.0) for number in range(3)]
    for request, codes in zip(requests, upscale(transformer, requests, side=side), strict=True):
        (prompted, drawn), (free, _) = (
            full_logits(transformer, text, request.low, codes, side) for text in (request.prompt, request.free)
        )
        assert (free + 4 * (prompted - free)).argmax(dim=1).tolist() == drawn.tolist()


@every_side
def test_a_batch_is_its_requests_one_by_one(transformer: MarsTransformer, side: int) -> None:
    together = upscale(transformer, MIXED, side=side)
    for row, request in enumerate(MIXED):
        assert torch.equal(upscale(transformer, [request], side=side)[0], together[row]), row
    assert torch.equal(together[1], together[4])
    assert len({tuple(codes.flatten().tolist()) for codes in together}) == 4


@every_side
def test_guidance_1_is_no_guidance(transformer: MarsTransformer, side: int) -> None:
    plain = [ask(number, 3) for number in range(3)]
    other = [replace(request, free=(99,)) for request in plain]
    assert torch.equal(upscale(transformer, plain, side=side), upscale(transformer, other, side=side))


def test_prompt_low_codes_seed_and_free_text_each_matter(transformer: MarsTransformer) -> None:
    base = ask(0, 1, guidance=3.0)
    changes: list[dict[str, Any]] = [{"prompt": PROMPTS[2]}, {"low": LOWS[1]}, {"seed": 2}, {"free": (1, 99, 98)}]
    drawn = upscale(transformer, [base, *(replace(base, **change) for change in changes)], side=2)
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:])


@every_side
def test_progress_is_told_after_each_block(transformer: MarsTransformer, side: int) -> None:
    told: list[tuple[int, int]] = []
    upscale(transformer, [ask(0)], side=side, progress=lambda *both: told.append(both))
    assert told == [(done, 32) for done in range(side * side, 33, side * side)]


def test_of_several_candidates_the_likeliest_is_kept(
    transformer: MarsTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ask(2, 11, guidance=2.0, temperature=1.5, candidates=5)
    kept = upscale(transformer, [request], side=2)[0]
    seeds = [(11 + number * SEED_STRIDE) % 2**63 for number in range(5)]
    alone = [upscale(transformer, [ask(2, seed, guidance=2.0, temperature=1.5)], side=2)[0] for seed in seeds]
    found = []
    for codes in alone:
        logits, drawn = full_logits(transformer, request.prompt, request.low, codes, 2)
        found.append(float(logits.log_softmax(dim=1).gather(1, drawn[:, None]).sum()))
    assert torch.equal(kept, alone[found.index(max(found))])
    assert len(set(found)) == 5
    monkeypatch.setattr(scheduler, "CPU_ROWS", 5)
    both = upscale(transformer, [ask(0, 3), request], side=2)
    assert torch.equal(both[1], kept)


def test_what_does_not_fit_is_one_line(
    transformer: MarsTransformer, build_tiny: Callable[..., MarsTransformer]
) -> None:
    with pytest.raises(ConfigError, match="blocks of 4x4 codes must fill the grid, got 6x12"):
        upscale(transformer, [replace(ask(0), grid=(6, 12))], side=4)
    with pytest.raises(ConfigError, match="must be a whole number of times the low one, got 4x6 for 2x4"):
        upscale(transformer, [replace(ask(0), grid=(4, 6))], side=1)
    with pytest.raises(RequestError, match="must have been trained to upscale"):
        upscale(build_tiny(), [ask(0)], side=2)
    limit = transformer.config.language.max_positions
    upscale(transformer, [replace(ask(0), prompt=(1,) * (limit - 41))], side=4)
    with pytest.raises(RequestError, match=f"must fit into {limit} positions, got {limit + 1}"):
        upscale(transformer, [replace(ask(0), prompt=(1,) * (limit - 40))], side=4)


def test_upscaling_leaves_text_to_image_as_it_is(transformer: MarsTransformer) -> None:
    request = DrawRequest(prompt=PROMPTS[0], free=FREE, grid=(2, 4), seed=3, sampling=Sampling(guidance=2.0))
    before = draw(transformer, [request])[0]
    upscale(transformer, MIXED, side=2)
    assert torch.equal(draw(transformer, [request])[0], before)


def test_pictures_and_upscaling_of_every_block_are_drawn_together(transformer: MarsTransformer) -> None:
    plain = DrawRequest(prompt=PROMPTS[0], free=FREE, grid=(3, 2), seed=3, sampling=Sampling(guidance=2.0))
    requests = [plain, ask(0, 4), replace(ask(1, 5), side=2), replace(ask(2, 6, guidance=3.0), side=4), ask(1, 7)]
    together = draw(transformer, requests)
    for request, codes in zip(requests, together, strict=True):
        assert codes.shape == request.grid
        assert torch.equal(draw(transformer, [request])[0], codes)


KNOWN = torch.arange(32).view(4, 8).where(torch.arange(32).view(4, 8) % 5 < 3, torch.tensor(-1))


@pytest.mark.parametrize("window", [1, 4])
def test_known_codes_are_kept_and_the_others_are_those_that_follow_them(
    transformer: MarsTransformer, window: int
) -> None:
    request = DrawRequest(
        prompt=PROMPTS[0],
        free=FREE,
        grid=HIGH,
        seed=0,
        known=KNOWN,
        sampling=Sampling(temperature=0, window=window),
    )
    found = draw(transformer, [request, replace(request, known=None)])[0]
    assert torch.equal(found[KNOWN >= 0], KNOWN[KNOWN >= 0])
    cache = transformer.new_cache()
    with torch.no_grad():
        transformer(text_segment([list(PROMPTS[0])]), cache)
        hidden = transformer(drawn_image(found[None], transformer.vocabulary), cache)
        likeliest = transformer.visual_logits(hidden)[0, :, : transformer.vocabulary.num_codes].argmax(dim=1)
    assert torch.equal(found[KNOWN < 0], likeliest.view(HIGH)[KNOWN < 0])


def test_known_codes_of_an_upscaled_picture_are_kept_too(transformer: MarsTransformer) -> None:
    request = replace(ask(0, 3), side=2, known=KNOWN)
    assert torch.equal(draw(transformer, [request])[0][KNOWN >= 0], KNOWN[KNOWN >= 0])


@pytest.mark.parametrize("known", [torch.zeros(3, 8, dtype=torch.long), torch.full(HIGH, 64)])
def test_known_codes_that_do_not_fit_are_one_line(transformer: MarsTransformer, known: Tensor) -> None:
    with pytest.raises(RequestError, match=r"known codes must fill a grid of 4x8 and be below 64, got"):
        draw(transformer, [replace(ask(0), low=None, known=known)])
