import asyncio
import json
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from openai import OpenAI

from benchmarks import serve_load
from benchmarks.server_process import COMMAND, lines, replicas, server
from mars.errors import PromptError, RequestError
from mars.generation.sampling import Sampling
from mars.pipeline import MarsPipeline
from mars.pipeline.drawings import Drawn, Preview
from mars.pipeline.orders import Order, draw_order
from mars.pipeline.writing import Words, reply
from mars.server.errors import ApiError
from mars.server.ray_engine import ATTEMPTS, RayWorker, Replica, hollow, ray_worker
from mars.server.worker import Begun, Ended, News, Refused
from tests.server.test_hearing import LONG, until


class Stream:
    """Stands for Ray's: the news of a replica, up to its death."""

    def __init__(self, news: AsyncGenerator[News, None], *, left: int) -> None:
        self.news = news
        self.left = left

    async def __aiter__(self) -> AsyncIterator[News]:
        from ray.exceptions import ActorDiedError

        async for one in self.news:
            if not self.left:
                raise ActorDiedError
            self.left -= 1
            yield pickle.loads(_dumps(one))

    def cancel(self) -> None:
        CLOSING.add(asyncio.ensure_future(self.news.aclose()))


CLOSING: set[Any] = set()


class Cluster:
    """Stands for Ray's handle: one replica in this process, which dies after so many news, time and again."""

    def __init__(self, replica: Replica, deaths: list[int]) -> None:
        self.replica = replica
        self.deaths = deaths
        self.work = self

    def options(self, *, stream: bool) -> "Cluster":
        assert stream
        return self

    def remote(self, *asked: Any) -> Stream:
        news = self.replica.work(*pickle.loads(_dumps(asked)))
        return Stream(news, left=self.deaths.pop(0) if self.deaths else sys.maxsize)


def _dumps(what: Any) -> bytes:
    from ray import cloudpickle

    return bytes(cloudpickle.dumps(what))


@pytest.fixture(scope="module")
def replica(tiny_model: Path) -> Replica:
    return Replica(lambda: MarsPipeline.from_pretrained(tiny_model))


def heard(replica: Replica, begin: Callable[..., Any], *, deaths: list[int], previews: int = 1) -> list[News]:
    """All news of a request whose replicas die."""

    async def work() -> list[News]:
        async with asyncio.timeout(60):
            worker = RayWorker(Cluster(replica, deaths), MarsPipeline(hollow(replica.worker.pipe.model)), queue=4)
            job = worker.submit(begin, previews=previews)
            news = [await job.news.get()]
            while not isinstance(news[-1], Drawn | Ended | Refused):
                news.append(await job.news.get())
            assert worker.held == 0
            return news

    return asyncio.run(work())


def drawn(pipe: MarsPipeline, *, seed: int | None = 5) -> Order:
    return draw_order(pipe, "a", n=2, seed=seed, sampling=Sampling(candidates=2))


def written(pipe: MarsPipeline) -> Iterator[Words]:
    return reply(pipe.model, "hello", system=None, max_tokens=12)


def test_what_a_replica_had_in_hand_is_done_again_and_nothing_is_told_twice(replica: Replica) -> None:
    wanted = heard(replica, drawn, deaths=[])[-1]
    assert isinstance(wanted, Drawn)
    for deaths in ([0], [1], [2], [1, 3]):
        found = heard(replica, drawn, deaths=deaths)
        assert [type(one) for one in found] == [Begun, Preview, Preview, Drawn]
        assert {(one.picture, one.number) for one in found if isinstance(one, Preview)} == {(0, 0), (1, 0)}
        assert isinstance(found[-1], Drawn)
        assert torch.equal(found[-1].generated.codes, wanted.generated.codes)
        assert found[-1].generated.images[0].info == wanted.generated.images[0].info
    words = heard(replica, written, deaths=[])
    assert sum(isinstance(one, Words) for one in words) > 3
    for number in (1, 2, len(words) - 1):
        assert heard(replica, written, deaths=[number]) == words


def test_without_a_seed_it_is_still_the_picture_that_was_begun(replica: Replica) -> None:
    begun, *_, last = heard(replica, partial(drawn, seed=None), deaths=[2])
    assert isinstance(begun, Begun)
    assert isinstance(last, Drawn)
    assert begun.order is not None
    assert last.generated.seeds == begun.order.seeds


def test_a_request_that_ends_its_replicas_is_given_up(replica: Replica) -> None:
    (last,) = heard(replica, drawn, deaths=[0] * ATTEMPTS)
    assert isinstance(last, Refused)
    assert isinstance(last.error, ApiError)
    assert last.error.status_code == 503


def test_errors_come_through(replica: Replica) -> None:
    def failing(_: MarsPipeline) -> Order:
        raise ZeroDivisionError

    (last,) = heard(replica, partial(draw_order, prompt=" "), deaths=[])
    assert isinstance(last, Refused)
    assert isinstance(last.error, PromptError)
    (last,) = heard(replica, failing, deaths=[])
    assert isinstance(last, Refused)
    assert "ZeroDivisionError" in str(last.error)
    assert "in failing" in str(last.error)


def test_what_is_cancelled_is_forgotten_by_its_replica(replica: Replica) -> None:
    async def work() -> None:
        worker = RayWorker(Cluster(replica, []), replica.worker.pipe, queue=4)
        job = worker.submit(partial(draw_order, prompt="a", n=4, sampling=Sampling(candidates=64)), size=4)
        with pytest.raises(ApiError, match="the queue is full"):
            worker.submit(drawn)
        assert isinstance(await job.news.get(), Begun)
        worker.cancel(job)
        async with asyncio.timeout(60):
            while worker.held or replica.worker.held:
                await asyncio.sleep(0.001)
        worker.cancel(job)
        worker.close()
        with pytest.raises(ApiError, match="shutting down"):
            worker.submit(drawn)

    asyncio.run(work())


def test_the_app_knows_the_model_without_its_weights(pipe: MarsPipeline) -> None:
    whole, empty = pipe.model, pickle.loads(pickle.dumps(hollow(pipe.model)))
    assert (empty.info, empty.visual_digest) == (whole.info, whole.visual_digest)
    assert MarsPipeline(empty).sizes == pipe.sizes
    assert MarsPipeline(empty).prompt_ids("red 红") == pipe.prompt_ids("red 红")
    assert all(weight.is_meta for weight in empty.transformer.parameters())


def test_without_ray_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(RequestError, match=r"pip install 'mars-t2i\[ray\]'"),
        ray_worker(MarsPipeline.from_pretrained, queue=4, replicas=1, max_replicas=1),
    ):
        pass


@pytest.mark.slow
def test_replicas_that_are_killed_lose_nothing(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    options = ["--model", str(tiny_model), "--seconds", "20", "--clients", "20", "--kill-every", "4", "--out", str(out)]
    with pytest.raises(SystemExit) as ended:
        serve_load.main([*options, "--", "--engine", "ray", "--replicas", "2"])
    found = json.loads(out.read_text("utf-8"))
    assert ended.value.code == 0, found["failures"]
    assert found["counts"]["killed"] >= 2
    assert found["counts"]["200"] > 50


@pytest.mark.slow
def test_the_app_is_the_same_on_a_cluster(tiny_model: Path, pipe: MarsPipeline, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("key\n", "utf-8")
    options = ["--model", str(tiny_model), "--engine", "ray", "--max-replicas", "2"]
    with server(tmp_path / "log", *options, "--api-keys", str(tmp_path / "keys"), "--queue", "10") as running:
        assert len(replicas(running.process.pid)) == 1

        def figures() -> str:
            return httpx2.get(f"{running.url}/metrics").text

        with OpenAI(base_url=f"{running.url}/v1", api_key="key", max_retries=0) as client:
            stream = client.images.generate(prompt="a", stream=True, partial_images=1, extra_body={"seed": 3})
            assert [one.type.rpartition(".")[2] for one in stream] == ["partial_image", "completed"]
            messages: list[Any] = [{"role": "user", "content": "hello"}]
            chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
            assert chat.choices[0].message.content == pipe.chat("hello", max_tokens=8).strip()
            with pytest.raises(openai.BadRequestError, match="at most 512 tokens"):
                client.images.generate(prompt="x" * 1000)
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: {len(json.dumps(LONG))}\r\n"
        head += "Authorization: Bearer key\r\nContent-Type: application/json\r\n\r\n"

        def hung_up() -> bool:
            with socket.create_connection(("127.0.0.1", running.port)) as connection:
                connection.sendall((head + json.dumps(LONG)).encode())
                time.sleep(0.1)  # it may be drawn by then
            return 'status="499"' in figures()

        until(hung_up)
        until(lambda: "mars_queue 0.0" in figures() and "mars_rows 0.0" in figures())
        assert httpx2.post(f"{running.url}/v1/images/generations", json={"prompt": "a"}).status_code == 401
        assert httpx2.get(f"{running.url}/ready").status_code == 200
        for status in ("200", "400", "499"):
            assert f'mars_requests_total{{path="/v1/images/generations",status="{status}"}}' in figures()
        pids = [running.process.pid, *replicas(running.process.pid)]
        assert running.end() == 0
        assert not [one for pid in pids for one in replicas(pid)]
    log = (tmp_path / "log").read_text("utf-8").splitlines()
    assert all(line.startswith("{") for line in log), log
    told = [line for line in lines(tmp_path / "log") if line["event"] == "request"]
    assert [line["status"] for line in told][:3] == [200, 200, 400]
    assert told[0]["n"] == 1


@pytest.mark.slow
def test_a_model_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    command = [*COMMAND, "--engine", "ray", "--model", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"mars: no model at {tmp_path / 'none'}; name a folder that holds config.json and visual.safetensors"
    ]
