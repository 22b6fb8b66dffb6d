"""Whatever is drawn beside a picture, and whenever it joins, it is what it would be alone."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mars.errors import RequestError
from mars.generation import prompts
from mars.generation.engine import draw
from mars.generation.prompts import Prompts
from mars.generation.request import DrawRequest
from mars.generation.sampling import Sampling
from mars.generation.scheduler import Event, Failed, Finished, RowDrawn, Scheduler
from mars.model.kernel import find_kernel
from mars.model.precision import lower_precision
from mars.model.transformer import MarsTransformer, read_prefixes

FREE = (1,)
TEXTS = [(1, 40, 41, 42, 43, 44), (1, 50), (1, 60, 61, 62), (1, *range(70, 90))]
GRIDS = [(2, 3), (3, 2), (1, 4), (3, 3)]

Build = Callable[..., MarsTransformer]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """So small a model only waits for threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def built(build_tiny: Build, pocket: dict[str, Any], *, precision: str) -> MarsTransformer:
    if precision == "fp16" and find_kernel() is None:
        pytest.skip("no C compiler, or a processor without AVX2")
    transformer = build_tiny(**{**pocket, "max_grid": 8}, low_input=True)
    if precision == "fp16":
        lower_precision(transformer, "fp16")
    return transformer


@pytest.fixture(scope="module", params=["fp16", "fp32"], ids=["kernel", "layers"])
def transformer(request: pytest.FixtureRequest, build_tiny: Build, pocket: dict[str, Any]) -> MarsTransformer:
    return built(build_tiny, pocket, precision=request.param)


@pytest.fixture(scope="module")
def layers(build_tiny: Build, pocket: dict[str, Any]) -> MarsTransformer:
    return built(build_tiny, pocket, precision="fp32")


def ask(seed: int = 0, *, text: int = 0, grid: tuple[int, int] = (2, 3), **sampling: Any) -> DrawRequest:
    return DrawRequest(prompt=TEXTS[text], free=FREE, grid=grid, seed=seed, sampling=Sampling(**sampling))


def some_request(dice: random.Random) -> DrawRequest:
    """One of any kind."""
    sampling = Sampling(
        temperature=dice.choice([0.0, 0.7, 1.0, 1.5]),
        top_k=dice.choice([0, 0, 5, 30]),
        top_p=dice.choice([1.0, 1.0, 0.9, 0.5]),
        guidance=dice.choice([1.0, 1.0, 2.0, 0.5]),
        guidance_stop=dice.choice([1.0, 1.0, 0.5, 0.2]),
        candidates=dice.choice([1, 1, 1, 2, 3]),
    )
    request = DrawRequest(
        prompt=dice.choice(TEXTS), free=dice.choice([FREE, TEXTS[1]]), grid=dice.choice(GRIDS),
        seed=dice.randrange(2**40), sampling=sampling,
    )  # fmt: skip
    if dice.random() < 0.2:
        low = torch.tensor([[dice.randrange(64) for _ in range(2)]])
        return replace(request, grid=(2, 4), low=low, side=dice.choice([1, 2]))
    return request


def finish(scheduler: Scheduler) -> list[Event]:
    events: list[Event] = []
    while scheduler.busy:
        events += scheduler.step()
    return events


def held(scheduler: Scheduler) -> int:
    """Places of the caches that there are."""
    caches = [batch.cache for batch in scheduler._batches.values() if batch.cache is not None]
    return sum(cache.store.shape[2] * cache.size for cache in caches)


def check_mix(transformer: MarsTransformer, pool: list[tuple[DrawRequest, Tensor]], dice: random.Random) -> int:
    """Some of the pool join at random steps, and some of those are cancelled; returns how many were compared."""
    coming = [dice.choice(pool) for _ in range(dice.randint(2, 6))]
    scheduler = Scheduler(transformer, rows=dice.randint(2, 12), tokens=dice.randint(2 * 29, 400))
    wanted: dict[int, tuple[DrawRequest, Tensor]] = {}
    found: dict[int, Tensor] = {}
    while coming or scheduler.busy:
        while coming and dice.random() < 0.4:
            request, codes = coming.pop()
            wanted[scheduler.submit(request)] = request, codes
        live = [ticket for ticket in wanted if ticket not in found]
        if live and dice.random() < 0.04:
            gone = dice.choice(live)
            scheduler.cancel(gone)
            del wanted[gone]
        for event in scheduler.step():
            request, codes = wanted[event.ticket]
            assert not isinstance(event, Failed)
            if isinstance(event, Finished):
                found[event.ticket] = event.codes
            elif request.sampling.candidates == 1:
                assert torch.equal(event.codes, codes[: len(event.codes)])
        assert scheduler.rows <= scheduler.max_rows
        assert held(scheduler) <= scheduler.tokens <= scheduler.max_tokens
    assert found.keys() == wanted.keys()
    for ticket, codes in found.items():
        assert torch.equal(codes, wanted[ticket][1]), wanted[ticket][0]
    assert held(scheduler) == 0
    return len(found)


@pytest.mark.parametrize("mixes", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_in_random_mixes_every_picture_is_what_it_is_alone(transformer: MarsTransformer, mixes: int) -> None:
    # PyTorch's products round differently with the number of rows: another code would be drawn where two are equally
    # likely to six digits or more. The test below shows what is the same to the bit.
    dice = random.Random(0)
    requests = [some_request(dice) for _ in range(30)]
    pool = [(request, draw(transformer, [request])[0]) for request in requests]
    assert len({tuple(codes.flatten().tolist()) for _, codes in pool}) > 25
    assert sum(check_mix(transformer, pool, dice) for _ in range(mixes)) > 3 * mixes


def test_likelihoods_are_the_same_to_the_bit_by_the_kernel_after_prompts_read_alone(
    build_tiny: Build, pocket: dict[str, Any]
) -> None:
    transformer = built(build_tiny, pocket, precision="fp16")

    def likelihoods(*requests: DrawRequest) -> list[float]:
        """Of the first request's candidates, after five codes."""
        scheduler = Scheduler(transformer, prompts=Prompts(transformer, together=0))
        for request in requests:
            scheduler.submit(request)
            scheduler.step()
        while True:
            for batch in scheduler._batches.values():
                found = [
                    value
                    for picture, value in zip(batch.pictures, batch.likelihoods_P.tolist(), strict=True)
                    if picture.ticket == 0 and picture.done == 5
                ]
                if found:
                    return found
            scheduler.step()

    first = ask(3, guidance=2.0, candidates=2)
    found = likelihoods(first, *(ask(seed, text=seed % 4, guidance=3.0) for seed in range(10, 14)))
    assert found == likelihoods(first)
    assert len(set(found)) == 2


def test_prompts_are_read_once_for_all_who_ask(layers: MarsTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, ...]] = []

    def watched(transformer: MarsTransformer, rows: list[tuple[int, ...]]) -> Any:
        read.extend(rows)
        return read_prefixes(transformer, rows)

    monkeypatch.setattr(prompts, "read_prefixes", watched)
    remembered = Prompts(layers)
    scheduler = Scheduler(layers, rows=4, prompts=remembered)
    for seed in range(5):
        scheduler.submit(ask(seed, guidance=2.0, candidates=3))
    finish(scheduler)
    assert read == [FREE, TEXTS[0]]
    scheduler = Scheduler(layers, prompts=remembered)
    scheduler.submit(ask(9, text=1, guidance=2.0))
    finish(scheduler)
    assert read == [FREE, TEXTS[0], TEXTS[1]]
    monkeypatch.setattr(prompts, "REMEMBERED_BYTES", 0)
    scheduler = Scheduler(layers, rows=1)
    for seed in range(3):
        scheduler.submit(ask(seed, text=2))
    finish(scheduler)
    assert read == [FREE, TEXTS[0], TEXTS[1], TEXTS[2]]  # all three held it
    scheduler.submit(ask(3, text=2))
    assert len(read) == 4
    scheduler.step()
    assert len(read) == 5


def test_short_texts_are_read_in_one_pass_and_long_ones_alone(
    layers: MarsTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[list[int]] = []

    def watched(transformer: MarsTransformer, rows: list[tuple[int, ...]]) -> Any:
        passes.append([len(row) for row in rows])
        return read_prefixes(transformer, rows)

    monkeypatch.setattr(prompts, "read_prefixes", watched)
    texts = [(1,) * length for length in (90, 4, 1, 60, 5, 100)]
    for together, wanted in ((120, [[1, 4, 5], [60], [90], [100]]), (0, [[1], [4], [5], [60], [90], [100]])):
        found = Prompts(layers, together=together)
        found.read_all(found.find(text) for text in [*texts, *texts])
        assert passes == wanted
        passes.clear()


def test_who_comes_first_is_served_first_and_nobody_waits_for_ever(layers: MarsTransformer) -> None:
    scheduler = Scheduler(layers, rows=2)
    tickets = [scheduler.submit(ask(0)), scheduler.submit(ask(1, guidance=2.0, candidates=2))]
    order: list[int] = []
    for step in range(60):
        tickets.append(scheduler.submit(ask(2 + step)))  # they would always fit beside the first
        order += [event.ticket for event in scheduler.step() if isinstance(event, Finished)]
        if tickets[1] in order:
            break
    assert order == tickets[:2]
    assert step + 1 == 18  # one alone, then the two candidates of the second, of two rows each
    order += [event.ticket for event in finish(scheduler) if isinstance(event, Finished)]
    assert order == sorted(order)


def test_a_long_request_waits_until_it_fits(layers: MarsTransformer) -> None:
    scheduler = Scheduler(layers, tokens=100)
    first = [scheduler.submit(ask(seed, text=1, grid=(3, 3))) for seed in range(9)]  # 11 tokens each: 99
    long = scheduler.submit(ask(9, text=3, grid=(3, 3)))  # 30 tokens: with two others it is 90
    scheduler.step()
    assert (scheduler.rows, scheduler.tokens) == (9, 99)
    for ticket in first[:6]:
        scheduler.cancel(ticket)
    scheduler.step()
    assert scheduler.rows == 3  # with those three it would be 120
    scheduler.cancel(first[6])
    scheduler.step()
    assert (scheduler.rows, scheduler.tokens) == (3, 90)
    finished = [event.ticket for event in finish(scheduler) if isinstance(event, Finished)]
    assert finished == [*first[7:], long]


def test_cancelling_frees_rows_at_once(layers: MarsTransformer) -> None:
    scheduler = Scheduler(layers)
    tickets = [scheduler.submit(ask(seed, guidance=2.0, candidates=2)) for seed in range(3)]
    scheduler.step()
    assert scheduler.rows == 12
    scheduler.cancel(tickets[1])
    assert scheduler.rows == 8
    waiting = scheduler.submit(ask(4))
    scheduler.cancel(waiting)
    scheduler.cancel(tickets[0])
    scheduler.cancel(tickets[2])
    scheduler.cancel(tickets[2])
    scheduler.cancel(1000)
    assert (scheduler.rows, scheduler.tokens, held(scheduler), scheduler.busy) == (0, 0, 0, False)
    assert scheduler.step() == []


def test_after_every_row_of_codes_there_is_news(transformer: MarsTransformer) -> None:
    requests = [
        ask(1, grid=(3, 2)),
        replace(ask(2, grid=(4, 4)), low=torch.tensor([[1, 2], [3, 4]]), side=2),
        ask(3, grid=(3, 3), candidates=4, temperature=1.5),
    ]
    wanted = draw(transformer, requests)
    scheduler = Scheduler(transformer)
    tickets = [scheduler.submit(request) for request in requests]
    events = finish(scheduler)
    for ticket, codes, rows in zip(tickets, wanted, ([1, 2], [2], [1, 2]), strict=True):
        own = [event for event in events if event.ticket == ticket]
        assert [len(event.codes) for event in own if isinstance(event, RowDrawn)] == rows
        assert isinstance(own[-1], Finished)
        for event in own[:2] if ticket != tickets[2] else own[2:]:
            assert isinstance(event, RowDrawn | Finished)
            assert torch.equal(event.codes, codes[: len(event.codes)])


def test_a_request_that_cannot_be_met_fails_alone(layers: MarsTransformer) -> None:
    good = ask(5, guidance=2.0)
    wanted = draw(layers, [good])[0]
    scheduler = Scheduler(layers, rows=3, tokens=100)
    ticket = scheduler.submit(good)
    with pytest.raises(RequestError, match="must fit into 192 positions, got 206; shorten the prompt"):
        scheduler.submit(replace(good, prompt=(1,) * 200))
    with pytest.raises(RequestError, match="3 rows and 100 tokens, got 2 rows and 112 tokens; shorten the prompt"):
        scheduler.submit(replace(good, prompt=(1,) * 50))
    bad = scheduler.submit(replace(good, prompt=(1, 10**6)))
    codes = scheduler.submit(replace(good, grid=(2, 4), low=torch.tensor([[1, 10**6]])))
    last = scheduler.submit(good)
    events = finish(scheduler)
    assert sorted(event.ticket for event in events if isinstance(event, Failed)) == [bad, codes]
    found = {event.ticket: event.codes for event in events if isinstance(event, Finished)}
    assert found.keys() == {ticket, last}
    assert all(torch.equal(one, wanted) for one in found.values())


def test_a_step_that_fails_takes_only_those_that_ran(layers: MarsTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = draw(layers, [ask(1)])[0]
    scheduler = Scheduler(layers, rows=2)
    tickets = [scheduler.submit(ask(seed, candidates=3 - seed)) for seed in range(2)]
    scheduler.step()
    later = scheduler.submit(ask(1))

    def broken(hidden: Tensor) -> Tensor:
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(layers, "visual_logits", broken)
        events = scheduler.step()
    assert [(type(event), event.ticket) for event in events] == [(Failed, tickets[0])]
    assert scheduler.rows == 0
    found = {event.ticket: event.codes for event in finish(scheduler) if isinstance(event, Finished)}
    assert found.keys() == {tickets[1], later}
    assert torch.equal(found[later], wanted)


def test_prompts_that_were_read_are_drawn_without_the_language_expert(build_tiny: Build) -> None:
    transformer = build_tiny()
    wanted = draw(transformer, [ask(1, guidance=2.0)])[0]
    scheduler = Scheduler(transformer)
    ticket = scheduler.submit(ask(1, guidance=2.0))
    scheduler.read_prompts()
    transformer.release_language()
    other = scheduler.submit(ask(1, text=2))
    events = {event.ticket: event for event in finish(scheduler)}
    done, failed = events[ticket], events[other]
    assert isinstance(done, Finished)
    assert torch.equal(done.codes, wanted)
    assert isinstance(failed, Failed)
    assert "released" in str(failed.error)
