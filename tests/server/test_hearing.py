import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx2
import openai
import pytest

from mars.server.settings import Limits
from mars.server.worker import Worker
from tests.server.conftest import Running, Start

LONG = {"prompt": "a", "n": 10, "candidates": 64, "seed": 1}
"""640 candidates, two rows each, 32 at a time."""


@contextmanager
def busy(worker: Worker, *, size: int = 1) -> Iterator[None]:
    """Keeps the worker's thread from doing anything."""
    go, begun = threading.Event(), threading.Event()

    async def submit() -> None:
        worker.submit(lambda _: (begun.set(), go.wait(60), iter(()))[-1], size=size)  # type: ignore[func-returns-value]

    asyncio.run(submit())
    assert begun.wait(60)
    try:
        yield
    finally:
        go.set()


def until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")


def figure(found: Running, name: str) -> float:
    lines = httpx2.get(f"{found.url}/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)


def test_a_full_queue_is_a_rate_limit_error(start: Start) -> None:
    with start(limits=Limits(queue=2, images=2)) as found, found.client() as client:
        with busy(found.worker, size=2):
            with pytest.raises(openai.RateLimitError) as caught:
                client.images.generate(prompt="x")
            assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
            assert caught.value.type == "rate_limit_error"
        until(lambda: found.worker.held == 0)
        assert client.images.generate(prompt="x", n=2).data


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_rows(start: Start, stream: bool) -> None:
    with start() as found:
        gone = 'mars_requests_total{path="/v1/images/generations",status="499"}'
        body = json.dumps(LONG | {"stream": stream}).encode()
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        with socket.create_connection(("127.0.0.1", found.port)) as connection:
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            until(lambda: found.worker.rows > 0)
            assert found.worker.held == 10
        until(lambda: found.worker.held == 0)
        assert found.worker.rows == 0
        until(lambda: figure(found, gone) == 1)
        assert figure(found, "mars_pictures_total") == 0
        with found.client() as client:
            client.images.generate(prompt="x")
        assert figure(found, "mars_pictures_total") == 1


def test_a_client_that_hangs_up_while_it_waits_is_forgotten(start: Start) -> None:
    with start() as found, found.client() as client:
        with busy(found.worker), pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).images.generate(prompt="x")
        until(lambda: found.worker.held == 0)
        assert figure(found, "mars_pictures_total") == 0


def test_what_takes_too_long_is_given_up(start: Start) -> None:
    with start(limits=Limits(seconds=0.2)) as found, found.client() as client:
        with busy(found.worker):
            for stream in (False, True):
                with pytest.raises(openai.InternalServerError, match=r"this took more than 0.2 s") as caught:
                    client.images.generate(prompt="x", stream=stream)
                assert caught.value.status_code == 504
        until(lambda: found.worker.held == 0)
