from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from mars.errors import RequestError
from mars.generation.engine import draw
from mars.generation.request import DrawRequest
from mars.generation.sampling import Sampling
from mars.generation.scheduler import RowDrawn, Scheduler
from mars.model.transformer import MarsTransformer
from mars.sequence.layout import drawn_image, text_segment

PROMPTS = [(1, 40, 41, 42, 43, 44), (1, 50), (1, 60, 61, 62)]
FREE = (1,)


@pytest.fixture(scope="module", params=["paper", "pocket"])
def transformer(
    request: pytest.FixtureRequest, build_tiny: Callable[..., MarsTransformer], pocket: dict[str, Any]
) -> MarsTransformer:
    return build_tiny(**(pocket if request.param == "pocket" else {}))


def ask(number: int, seed: int = 0, *, grid: tuple[int, int] = (3, 4), **sampling: Any) -> DrawRequest:
    return DrawRequest(prompt=PROMPTS[number], free=FREE, grid=grid, seed=seed, sampling=Sampling(**sampling))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("window", [2, 5, 16])
def test_the_likeliest_codes_are_those_of_one_at_a_time(
    transformer: MarsTransformer, window: int, guidance: float
) -> None:
    wanted, found = (
        draw(transformer, [ask(number, window=size, temperature=0, guidance=guidance) for number in range(3)])
        for size in (1, window)
    )
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_a_picture_depends_on_its_own_request_alone(transformer: MarsTransformer) -> None:
    requests = [ask(number, seed, window=4, guidance=2.0) for number, seed in ((0, 1), (1, 2), (2, 3), (1, 4))]
    requests += [ask(1, 9, window=1), ask(2, 5, window=7, candidates=3)]
    together = draw(transformer, requests)
    for request, codes in zip(requests, together, strict=True):
        assert torch.equal(draw(transformer, [request])[0], codes)
    assert len({tuple(codes.flatten().tolist()) for codes in together}) == len(requests)


def exact(transformer: MarsTransformer, *, guidance: float, places: int) -> dict[tuple[int, ...], float]:
    """The probability of every picture (1, places) when each code is one of the two likeliest, by full passes."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for place in range(places):
        longer: dict[tuple[int, ...], float] = {}
        for codes, share in found.items():
            grid = torch.tensor([[*codes, *[0] * (places - place)]])

            def logits(text: Sequence[int], grid: torch.Tensor = grid, place: int = place) -> torch.Tensor:
                cache = transformer.new_cache()
                transformer(text_segment([list(text)]), cache)
                hidden = transformer(drawn_image(grid[None], transformer.vocabulary), cache)
                return transformer.visual_logits(hidden)[0, place, : transformer.vocabulary.num_codes]

            free = logits(FREE)
            two = (free + guidance * (logits(PROMPTS[0]) - free)).topk(2)
            for code, part in zip(two.indices.tolist(), two.values.double().softmax(dim=0).tolist(), strict=True):
                longer[*codes, code] = share * part
        found = longer
    return found


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_pictures_have_the_distribution_of_one_code_at_a_time(
    build_tiny: Callable[..., MarsTransformer], guidance: float
) -> None:
    transformer, count = build_tiny(), 1500
    wanted = exact(transformer, guidance=guidance, places=4)
    requests = [ask(0, seed, window=3, grid=(1, 4), guidance=guidance, top_k=2) for seed in range(count)]
    drawn = Counter(tuple(codes.flatten().tolist()) for codes in draw(transformer, requests))
    assert set(drawn) <= set(wanted)
    distance = sum((drawn[codes] - count * share) ** 2 / (count * share) for codes, share in wanted.items())
    assert distance < 37.7  # one in a thousand at 15 degrees of freedom
    assert max(wanted.values()) < 0.7, "the model is too sure of itself to tell"


def test_a_step_makes_several_codes_certain_and_tells_of_every_row(transformer: MarsTransformer) -> None:
    scheduler = Scheduler(transformer)
    scheduler.submit(ask(0, 3, window=6, temperature=0.3))
    steps, rows = 0, []
    while scheduler.busy:
        steps += 1
        rows += [len(event.codes) for event in scheduler.step() if isinstance(event, RowDrawn)]
    assert steps < 12
    assert scheduler.drawn == 12
    assert rows == sorted(set(rows))
    assert set(rows) <= {1, 2}


@pytest.mark.parametrize("window", [0, -1, 65])
def test_a_window_that_cannot_be_is_one_line(window: int) -> None:
    with pytest.raises(RequestError, match=f"window must lie in 1..64 .*, got {window}"):
        Sampling(window=window)
