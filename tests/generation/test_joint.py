from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mars.errors import RequestError
from mars.generation.engine import draw, text_ids
from mars.generation.joint import Drew, DrewRow, WriteRequest, Wrote, write
from mars.generation.request import DrawRequest
from mars.generation.sampling import Sampling
from mars.model.transformer import MarsTransformer
from mars.sequence.interleaved import ImagePart, TextPart
from mars.sequence.layout import read_image, text_segment

GRID = (2, 3)
FREE = (1,)
START = TextPart(ids=(1, 40, 41, 42))


@pytest.fixture(params=["paper", "pocket"])
def transformer(
    request: pytest.FixtureRequest, build_tiny: Callable[..., MarsTransformer], pocket: dict[str, Any]
) -> MarsTransformer:
    transformer = build_tiny(**(pocket if request.param == "pocket" else {}))
    with torch.no_grad():  # an image where the fourth id would stand
        fourth = list(text_ids(transformer, START.ids, max_tokens=4, end=()))[3]
        transformer.special_head.weight[0] = 1.2 * transformer.text_table[fourth]
    return transformer


def ask(**options: Any) -> WriteRequest:
    return WriteRequest(**{"parts": [START], "end": (), "grid": GRID, "free": FREE, "max_tokens": 24, **options})


def document(events: Iterator[Wrote | DrewRow | Drew]) -> list[int | Tensor]:
    """What was written and drawn, without the rows in between."""
    return [event.id if isinstance(event, Wrote) else event.codes for event in events if not isinstance(event, DrewRow)]


def likeliest(transformer: MarsTransformer, before: list[int | Tensor]) -> int | None:
    """The next id after a document by one full pass over it, None for an image."""
    cache, texts = transformer.new_cache(), list(START.ids)
    with torch.no_grad():
        for one in before:
            if isinstance(one, int):
                texts.append(one)
                continue
            if texts:
                transformer(text_segment([texts]), cache)
            transformer(read_image(one[None], transformer.vocabulary), cache)
            texts = [transformer.vocabulary.image_end]
        state = transformer(text_segment([texts]), cache)[:, -1]
        text, special = transformer.text_logits(state)[0], transformer.special_logits(state)[0, 0]
    return None if special > text.max() else int(text.argmax())


def test_every_choice_is_that_of_a_full_pass_and_images_are_those_of_their_text(transformer: MarsTransformer) -> None:
    found = document(write(transformer, ask(drawing=Sampling(temperature=0), max_images=3)))
    images = [place for place, one in enumerate(found) if isinstance(one, Tensor)]
    assert 0 < len(images) <= 3
    assert len(found) - len(images) == 24
    for place, one in enumerate(found[: images[-1] + 1]):
        assert likeliest(transformer, found[:place]) == (None if isinstance(one, Tensor) else one), place
    texts = [one for one in found[: images[0]] if isinstance(one, int)]
    request = DrawRequest(
        prompt=(*START.ids, *texts), free=FREE, grid=GRID, seed=0, sampling=Sampling(temperature=0)
    )  # fmt: skip
    assert torch.equal(draw(transformer, [request])[0], found[images[0]])  # type: ignore[arg-type]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_image_is_the_one_that_a_call_draws_after_the_same_text(
    transformer: MarsTransformer, guidance: float
) -> None:
    drawing = Sampling(temperature=1.2, guidance=guidance)
    events = list(write(transformer, ask(drawing=drawing, seed=5, max_images=1)))
    texts = []
    for event in events:
        if not isinstance(event, Wrote):
            break
        texts.append(event.id)
    first = next(event.codes for event in events if isinstance(event, Drew))
    request = DrawRequest(prompt=(*START.ids, *texts), free=FREE, grid=GRID, seed=5, sampling=drawing)
    assert torch.equal(draw(transformer, [request])[0], first)
    rows = [event.codes for event in events if isinstance(event, DrewRow)]
    assert [len(one) for one in rows] == [1]
    assert torch.equal(rows[0], first[:1])


def test_an_image_can_be_drawn_in_fewer_steps_and_with_guidance_that_stops(transformer: MarsTransformer) -> None:
    drawing = Sampling(temperature=0, guidance=3.0, guidance_stop=0.5)
    wanted, found = (
        list(write(transformer, ask(drawing=replace(drawing, window=window), max_images=2))) for window in (1, 4)
    )
    drawn = [event.codes for event in wanted if isinstance(event, Drew)]
    assert drawn
    assert list(map(str, document(iter(found)))) == list(map(str, document(iter(wanted))))
    for event in found:
        if isinstance(event, DrewRow):
            assert any(torch.equal(event.codes, codes[: len(event.codes)]) for codes in drawn)


def test_without_images_it_is_the_base_llm(transformer: MarsTransformer) -> None:
    found = document(write(transformer, ask(max_images=0)))
    assert found == list(text_ids(transformer, START.ids, max_tokens=24, end=()))
    assert document(write(transformer, ask(max_images=0, end=(found[5],)))) == found[: found.index(found[5])]


def test_it_goes_on_from_images_too(transformer: MarsTransformer) -> None:
    codes = torch.arange(6).view(GRID)
    parts = [START, ImagePart(codes_RC=codes, role="read"), TextPart(ids=(7, 8))]
    found = document(write(transformer, ask(parts=parts, max_images=0, max_tokens=5)))
    assert found != document(write(transformer, ask(parts=[START, TextPart(ids=(7, 8))], max_images=0, max_tokens=5)))
    assert found[0] == likeliest(transformer, [codes, 7, 8])


def test_the_same_seed_gives_the_same_document(transformer: MarsTransformer) -> None:
    warm = ask(writing=Sampling(temperature=1.0), drawing=Sampling(temperature=1.0), seed=3)
    found = [list(map(str, document(write(transformer, replace(warm, seed=seed))))) for seed in (3, 3, 4)]
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 10_000}, "must fit into .* positions, got 4 and .* ask for fewer tokens or images"),
        ({"parts": []}, "there must be a text to begin with"),
        ({"parts": [ImagePart(codes_RC=torch.zeros(GRID, dtype=torch.long))]}, "there must be a text to begin with"),
    ],
)
def test_what_cannot_be_written_is_one_line(transformer: MarsTransformer, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        write(transformer, ask(**options))
