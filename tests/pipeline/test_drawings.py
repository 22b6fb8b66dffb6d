from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mars.errors import RequestError
from mars.generation.sampling import Sampling
from mars.pipeline import MarsPipeline
from mars.pipeline.drawings import MAX_PREVIEWS, DrawingFailed, Drawings, Drawn, News, Preview
from mars.pipeline.orders import Generated, draw_order, upscale_order

SAMPLING = Sampling(guidance=2.0, candidates=2)


def finish(drawings: Drawings) -> list[News]:
    news: list[News] = []
    while drawings.busy:
        news += drawings.step()
    return news


def same(found: Generated, wanted: Generated) -> None:
    assert torch.equal(found.codes, wanted.codes)
    assert (found.prompts, found.seeds) == (wanted.prompts, wanted.seeds)
    for one, other in zip(found.images, wanted.images, strict=True):
        assert one.info == other.info
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1


def test_orders_that_come_one_after_the_other_are_drawn_as_single_calls(tiny_upscaler: Path) -> None:
    pipe = MarsPipeline.from_pretrained(tiny_upscaler)
    wanted = [
        pipe("a red apple", n=2, seed=1, sampling=SAMPLING),
        pipe("x", seed=2, negative_prompt="blue"),
        pipe(["a", "b"], seed=3, sampling=Sampling(temperature=0)),
    ]
    larger = pipe.upscale(wanted[0])
    drawings = Drawings(pipe, rows=6)
    news: list[News] = []
    running = [drawings.submit(draw_order(pipe, "a red apple", n=2, seed=1, sampling=SAMPLING))]
    news += drawings.step() + drawings.step()
    running.append(drawings.submit(draw_order(pipe, "x", seed=2, negative_prompt="blue")))
    running.append(drawings.submit(draw_order(pipe, ["a", "b"], seed=3, sampling=Sampling(temperature=0))))
    running.append(drawings.submit(upscale_order(pipe, wanted[0])))
    news += finish(drawings)
    found = {one.drawing: one.generated for one in news if isinstance(one, Drawn)}
    assert len(news) == len(found) == 4
    for drawing, generated in zip(running, [*wanted, larger], strict=True):
        same(found[drawing], generated)
        assert found[drawing].seconds["total"] > 0


def test_previews_show_the_rows_so_far_and_change_nothing(tiny_upscaler: Path) -> None:
    pipe = MarsPipeline.from_pretrained(tiny_upscaler)
    wanted = pipe("a red apple", n=2, seed=1)
    seen: list[Preview] = []
    same(pipe("a red apple", n=2, seed=1, previews=3, on_preview=seen.append), wanted)
    assert [(one.picture, one.number) for one in seen] == [(0, 0), (1, 0)]  # of two rows
    for one in seen:
        assert one.image.size == (48, 32)
        lower = np.asarray(one.image)[16:]
        assert (lower == 255).all()
        (upper,) = pipe.decode(wanted.codes[[one.picture], :1])
        assert np.abs(np.asarray(one.image.crop((0, 0, 48, 16)), dtype=int) - np.asarray(upper, dtype=int)).max() <= 1
    drawings = Drawings(pipe)
    order = upscale_order(pipe, wanted, sampling=Sampling(candidates=2))
    for count in (0, 1, 2, MAX_PREVIEWS):
        drawings.submit(order, previews=count)  # four rows that come by two
        found = [(one.picture, one.number) for one in finish(drawings) if isinstance(one, Preview)]
        assert found == ([(0, 0), (1, 0)] if count else [])


def test_no_more_previews_than_were_asked_for(pipe: MarsPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mars.pipeline.orders.find_grid", lambda *_, **__: (9, 2))
    for count, rows in ((1, [5]), (2, [3, 6]), (3, [3, 5, 7]), (8, list(range(1, 9))), (16, list(range(1, 9)))):
        drawings = Drawings(pipe)
        drawings.submit(draw_order(pipe, "a", seed=1, sampling=SAMPLING), previews=count)
        previews = [one for one in finish(drawings) if isinstance(one, Preview)]
        assert [one.number for one in previews] == list(range(len(rows)))
        found = [one.image for one in previews]
        assert all(image.size == (32, 144) for image in found)
        blank = [int((np.asarray(image) == 255).all(axis=(1, 2)).sum()) for image in found]
        assert [9 - white // 16 for white in blank] == rows


def test_what_is_cancelled_is_never_heard_of_again(pipe: MarsPipeline) -> None:
    wanted = pipe("x", seed=2)
    drawings = Drawings(pipe)
    first, second = (
        drawings.submit(draw_order(pipe, text, n=n, seed=2), previews=1) for text, n in (("a", 3), ("x", 1))
    )
    drawings.step()
    drawings.cancel(first)
    assert drawings.scheduler.rows == 8
    news = finish(drawings)
    assert {one.drawing for one in news} == {second}
    assert isinstance(news[-1], Drawn)
    same(news[-1].generated, wanted)
    drawings.cancel(second)


def test_an_order_that_cannot_be_met_fails_alone(pipe: MarsPipeline, tiny_model: Path) -> None:
    wanted = pipe("x", seed=2)
    drawings = Drawings(pipe, tokens=120)
    good = drawings.submit(draw_order(pipe, "x", seed=2))
    order = draw_order(pipe, ["y", "z" * 80], seed=1)
    with pytest.raises(RequestError, match="must fit into 32 rows and 120 tokens, got 2 rows and 174 tokens"):
        drawings.submit(order)
    with pytest.raises(RequestError, match=f"0 to {MAX_PREVIEWS} previews of a picture, got 17"):
        drawings.submit(draw_order(pipe, "x", seed=2), previews=17)
    (news,) = finish(drawings)
    assert isinstance(news, Drawn)
    assert news.drawing is good
    same(news.generated, wanted)

    released = MarsPipeline.from_pretrained(tiny_model)
    released.model.transformer.release_language()
    drawings = Drawings(released)
    several = drawings.submit(draw_order(released, ["x", "y"], seed=2))
    (failed,) = finish(drawings)
    assert isinstance(failed, DrawingFailed)
    assert failed.drawing is several
    with pytest.raises(RequestError, match="released"):
        released("x")


def test_a_preview_is_a_picture(pipe: MarsPipeline) -> None:
    image = pipe.preview(torch.tensor([[1, 2, 3]]), rows=4)
    assert isinstance(image, Image.Image)
    assert image.size == (48, 64)
