"""Guidance that ends before a picture is done. What else a batch does, the scheduler's tests show."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mars.errors import RequestError
from mars.generation.engine import draw
from mars.generation.request import DrawRequest
from mars.generation.sampling import Sampling
from mars.generation.scheduler import Finished, Scheduler
from mars.model.transformer import MarsTransformer

FREE = (1, 9)
GRID = (3, 4)


@pytest.fixture(scope="module", params=["paper", "pocket"])
def transformer(
    request: pytest.FixtureRequest, build_tiny: Callable[..., MarsTransformer], pocket: dict[str, Any]
) -> MarsTransformer:
    return build_tiny(**({**pocket, "max_grid": 8} if request.param == "pocket" else {}), low_input=True)


def ask(seed: int = 0, *, prompt: tuple[int, ...] = (1, 40, 41, 42), **sampling: Any) -> DrawRequest:
    settings = Sampling(**{"guidance": 3.0, "temperature": 1.0, **sampling})
    return DrawRequest(prompt=prompt, free=FREE, grid=GRID, seed=seed, sampling=settings)


def with_stop(request: DrawRequest, stop: float) -> DrawRequest:
    return replace(request, sampling=replace(request.sampling, guidance_stop=stop))


def not_guided(request: DrawRequest) -> DrawRequest:
    return replace(request, sampling=replace(request.sampling, guidance=1.0))


def upscaled(seed: int, **sampling: Any) -> DrawRequest:
    return replace(ask(seed, **sampling), low=torch.tensor([[1, 2, 3]]), grid=(2, 6), side=2)


def one(transformer: MarsTransformer, request: DrawRequest) -> Tensor:
    return draw(transformer, [request])[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("guided", [1, 5, 11])
def test_codes_are_guided_up_to_the_stop_and_then_follow_the_prompt_alone(
    transformer: MarsTransformer, guided: int, temperature: float
) -> None:
    whole = ask(4, temperature=temperature)
    found = one(transformer, with_stop(whole, guided / 12)).flatten()
    wanted = one(transformer, whole).flatten()
    assert torch.equal(found[:guided], wanted[:guided])
    known = torch.cat([wanted[:guided], wanted.new_full((12 - guided,), -1)]).view(GRID)
    alone = one(transformer, replace(not_guided(whole), known=known))
    assert torch.equal(found, alone.flatten())
    if guided == 1:
        assert not torch.equal(found, wanted)


@pytest.mark.parametrize("make", [ask, upscaled])
def test_a_stop_at_the_end_is_guidance_and_one_at_the_start_is_none(
    transformer: MarsTransformer, make: Callable[..., DrawRequest]
) -> None:
    request = make(2)
    assert torch.equal(one(transformer, with_stop(request, 1.0)), one(transformer, request))
    assert torch.equal(one(transformer, with_stop(request, 0.0)), one(transformer, not_guided(request)))
    assert with_stop(request, 0.0).texts == not_guided(request).texts
    assert not torch.equal(one(transformer, request), one(transformer, not_guided(request)))


def test_where_guidance_ends_inside_a_block_it_ends_at_its_code(transformer: MarsTransformer) -> None:
    request = upscaled(3, temperature=0.0)
    order = request.order()
    guided, found = (one(transformer, again).flatten()[order] for again in (request, with_stop(request, 6 / 12)))
    assert torch.equal(found[:6], guided[:6])
    assert not torch.equal(found[6:], guided[6:])
    known = torch.full((12,), -1)
    known[order[:4]] = guided[:4]
    block = one(transformer, replace(not_guided(request), known=known.view(2, 6))).flatten()[order]
    assert torch.equal(found[6:8], block[6:8])


@pytest.mark.parametrize("window", [3, 5])
@pytest.mark.parametrize("stop", [0.0, 0.1, 0.5, 0.9])
def test_a_window_ends_guidance_at_the_same_code(transformer: MarsTransformer, window: int, stop: float) -> None:
    request = ask(1, temperature=0.0, guidance_stop=stop)
    wide = replace(request, sampling=replace(request.sampling, window=window))
    assert torch.equal(one(transformer, wide), one(transformer, request))


def test_pictures_do_not_depend_on_where_the_guidance_of_others_ends(transformer: MarsTransformer) -> None:
    stops = (1.0, 0.0, 0.25, 0.5, 0.75, 0.5)
    for window in (1, 4):
        requests = [
            ask(seed, prompt=(1, *range(30, 31 + seed)), guidance_stop=stop, window=window, candidates=1 + seed % 2)
            for seed, stop in enumerate(stops)
        ]
        for request, codes in zip(requests, draw(transformer, requests), strict=True):
            assert torch.equal(one(transformer, request), codes)


def test_a_row_that_is_not_needed_any_more_is_free_for_others(transformer: MarsTransformer) -> None:
    scheduler = Scheduler(transformer, rows=3)
    first, second = scheduler.submit(ask(1, guidance_stop=0.5)), scheduler.submit(ask(2))
    rows, finished = [], {}
    for step in range(40):
        for event in scheduler.step():
            assert isinstance(event, Finished) or event.ticket in (first, second)
            if isinstance(event, Finished):
                finished[event.ticket] = step, event.codes
        rows.append(scheduler.rows)
        if not scheduler.busy:
            break
    assert rows[:5] == [2] * 5
    assert rows[5] == 1  # its guidance is over
    assert rows[6:11] == [3] * 5  # the other one has joined it
    assert rows[11:] == [2] * 6 + [0]
    for ticket, request in ((first, ask(1, guidance_stop=0.5)), (second, ask(2))):
        assert torch.equal(finished[ticket][1], one(transformer, request))


def test_every_candidate_says_how_many_steps_it_took(transformer: MarsTransformer) -> None:
    scheduler = Scheduler(transformer)
    plain = scheduler.submit(ask(1, candidates=3, guidance_stop=0.5))
    wide = scheduler.submit(ask(1, temperature=0.2, window=6))
    blocks = scheduler.submit(upscaled(1))
    found: dict[int, list[int]] = {}
    while scheduler.busy:
        for event in scheduler.step():
            if isinstance(event, Finished):
                found[event.ticket] = [candidate.steps for candidate in event.candidates]
    assert (found[plain], found[blocks]) == ([12] * 3, [3])
    assert 2 <= found[wide][0] < 12


@pytest.mark.parametrize("stop", [-0.1, 1.1, float("nan")])
def test_a_stop_that_cannot_be_is_one_line(stop: float) -> None:
    with pytest.raises(RequestError, match=r"guidance_stop must lie in 0\.\.1 .*, got"):
        Sampling(guidance_stop=stop)
