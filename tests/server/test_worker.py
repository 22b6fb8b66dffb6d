import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from mars.errors import PromptError
from mars.generation.sampling import Sampling
from mars.pipeline import MarsPipeline
from mars.pipeline.drawings import Drawn, Preview
from mars.pipeline.orders import Order, draw_order
from mars.pipeline.writing import Words, reply
from mars.server.errors import ApiError
from mars.server.worker import MAX_WRITERS, Begun, Ended, Job, News, Refused, Worker

MANY = Sampling(candidates=64)


@pytest.fixture
def worker(tiny_model: Path) -> Iterator[Worker]:
    made = Worker(MarsPipeline.from_pretrained(tiny_model), queue=12)
    yield made
    made.close()
    made.join(60)
    assert not made.ready
    assert (made.held, made.rows) == (0, 0)


def ordered(seed: int, *, n: int = 1, sampling: Sampling = MANY) -> Callable[[MarsPipeline], Order]:
    return partial(draw_order, prompt="a", seed=seed, n=n, sampling=sampling)


async def heard(job: Job) -> list[News]:
    """All of it."""
    news = [await job.news.get()]
    while not isinstance(news[-1], Drawn | Ended | Refused):
        news.append(await job.news.get())
    return news


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(120):
            await work()

    asyncio.run(limited())


def test_pictures_are_the_same_alone_and_beside_others(worker: Worker) -> None:
    async def work() -> None:
        few = Sampling(candidates=2)
        alone = [(await heard(worker.submit(ordered(seed, sampling=few))))[-1] for seed in range(4)]
        jobs = [worker.submit(ordered(seed, sampling=few), previews=1) for seed in range(4)]
        together = await asyncio.gather(*map(heard, jobs))
        for one, news in zip(alone, together, strict=True):
            assert [type(told) for told in news] == [Begun, Preview, Drawn]
            assert isinstance(one, Drawn)
            assert isinstance(news[-1], Drawn)
            assert torch.equal(one.generated.codes, news[-1].generated.codes)

    run(work)


def test_what_is_cancelled_frees_its_rows_and_its_place(worker: Worker) -> None:
    async def work() -> None:
        running, waiting = worker.submit(ordered(1, n=10), size=10), worker.submit(ordered(2))
        assert isinstance(await running.news.get(), Begun)
        while not worker.rows:
            await asyncio.sleep(0.001)
        assert worker.held == 11
        worker.cancel(running)
        while worker.held > 1:
            await asyncio.sleep(0.001)
        worker.cancel(waiting)
        while worker.held:
            await asyncio.sleep(0.001)
        assert worker.rows == 0
        assert running.news.empty()
        worker.cancel(running)
        assert isinstance((await heard(worker.submit(ordered(3))))[-1], Drawn)

    run(work)


def test_a_full_queue_says_when_to_ask_again(worker: Worker) -> None:
    async def work() -> None:
        go = threading.Event()

        def wait(_: MarsPipeline) -> Iterator[Words]:
            go.wait(60)
            return iter(())

        held = worker.submit(wait, size=11)
        one = worker.submit(ordered(1))
        with pytest.raises(ApiError, match="the queue is full") as caught:
            worker.submit(ordered(2))
        assert caught.value.status_code == 429
        assert caught.value.headers
        assert 1 <= int(caught.value.headers["Retry-After"]) <= 60
        go.set()
        assert [type(told) for told in await heard(held)] == [Begun, Ended]
        assert isinstance((await heard(one))[-1], Drawn)
        assert isinstance((await heard(worker.submit(ordered(2))))[-1], Drawn)

    run(work)


def test_what_fails_fails_alone_or_with_what_was_drawn_beside_it(worker: Worker) -> None:
    def spoilt(pipe: MarsPipeline) -> Order:
        def keep(_: Image.Image) -> Image.Image:
            raise ZeroDivisionError

        return replace(draw_order(pipe, "a", seed=1), keep=keep)

    async def work() -> None:
        (news,) = await heard(worker.submit(partial(draw_order, prompt=" ")))
        assert isinstance(news, Refused)
        assert isinstance(news.error, PromptError)
        news = (await heard(worker.submit(spoilt)))[-1]
        assert isinstance(news, Refused)
        assert isinstance(news.error, ZeroDivisionError)
        assert isinstance((await heard(worker.submit(ordered(3))))[-1], Drawn)

    run(work)


def test_texts_are_written_beside_pictures_a_few_at_a_time(worker: Worker) -> None:
    def said(text: str) -> Callable[[MarsPipeline], Iterator[Words]]:
        return lambda pipe: (piece for piece in reply(pipe.model, text, system=None, max_tokens=6))

    async def work() -> None:
        drawing = worker.submit(ordered(1))
        jobs = [worker.submit(said(f"hello {number}")) for number in range(MAX_WRITERS + 2)]
        for number, news in enumerate(await asyncio.gather(*map(heard, jobs))):
            assert isinstance(news[0], Begun)
            assert isinstance(news[-1], Ended)
            text = "".join(told.text for told in news if isinstance(told, Words))
            assert text == worker.pipe.chat(f"hello {number}", system=None, max_tokens=6)  # type: ignore[arg-type]
        news = await heard(worker.submit(said(" ")))
        assert isinstance(news[-1], Refused)
        assert isinstance((await heard(drawing))[-1], Drawn)

    run(work)


def test_what_was_accepted_is_finished(worker: Worker) -> None:
    async def work() -> None:
        jobs = [worker.submit(ordered(seed)) for seed in range(3)]
        worker.close()
        with pytest.raises(ApiError, match="shutting down") as caught:
            worker.submit(ordered(9))
        assert caught.value.status_code == 503
        for news in await asyncio.gather(*map(heard, jobs)):
            assert isinstance(news[-1], Drawn)

    run(work)
