import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator

import httpx2
import openai
import pytest
from PIL import Image
from starlette.requests import Request

from mars.pipeline import MarsPipeline
from mars.pipeline.orders import Order
from mars.pipeline.writing import Words
from mars.server.errors import ApiError
from mars.server.hearing import Hearing
from mars.server.settings import Keys, Limits
from tests.server.conftest import Lines, Running, Start


def test_a_key_is_asked_for(start: Start, log: Lines) -> None:
    with start(keys=Keys(["first-key", "second-key"])) as found:
        for key in ("first-ke", "first-keyy", "x"):
            with pytest.raises(openai.AuthenticationError) as caught, found.client(key) as client:
                client.models.list()
            assert caught.value.code == "invalid_api_key"
            assert key not in str(caught.value)
        with found.client("second-key") as client:
            assert [one.id for one in client.models.list()] == ["tiny"]
        for headers in ({}, {"Authorization": "Basic first-key"}, {"Authorization": "Bearer"}):
            assert httpx2.post(f"{found.url}/v1/images/edits", headers=headers).status_code == 401
        for path in ("/health", "/ready", "/metrics", "/openapi.json"):
            assert httpx2.get(found.url + path).status_code == 200
        assert "security" in httpx2.get(f"{found.url}/openapi.json").json()["paths"]["/v1/models"]["get"]
    assert all("first-key" not in json.dumps(line) for line in log.lines)


def test_a_body_that_is_too_large_is_refused_once_it_is_read(start: Start) -> None:
    with start(limits=Limits(body=10_000)) as found, found.client() as client:
        with pytest.raises(openai.APIStatusError, match="at most 10,000 bytes, got 10,") as caught:
            client.images.generate(prompt="x" * 10_000)
        assert caught.value.status_code == 413
        chunks = (b"x" * 1000 for _ in range(5000))
        answer = httpx2.post(f"{found.url}/v1/images/generations", content=chunks)
        assert answer.status_code == 413
        assert answer.json()["error"]["message"].startswith("a request must have at most 10,000 bytes, got 5,000,000")


def test_a_body_must_arrive_in_time(start: Start, log: Lines) -> None:
    with start(limits=Limits(body_seconds=0.2)) as found:
        for end, status in ((b"", 408), (None, 499)):
            with socket.create_connection(("127.0.0.1", found.port), timeout=60) as slow:
                slow.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nab")
                if end is not None:
                    assert b" 408 " in slow.recv(1000).splitlines()[0]
            log.wait(status)


def test_only_so_many_requests_are_open_at_once(start: Start) -> None:
    with start(limits=Limits(requests=1)) as found, socket.create_connection(("127.0.0.1", found.port)) as slow:
        slow.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nab")
        for _ in range(1000):
            answer = httpx2.get(f"{found.url}/v1/models")
            if answer.status_code == 429:
                break
            time.sleep(0.01)
        assert answer.headers["retry-after"] == "1"
        assert httpx2.get(f"{found.url}/health").status_code == 200


def test_the_log_has_ids_and_no_prompts_unless_asked(start: Start, started: Running, log: Lines) -> None:
    asked = {"prompt": "a secret", "user": "me"}
    answer = httpx2.post(
        f"{started.url}/v1/images/generations", json=asked, headers={"X-Request-Id": "my-id.1"}, timeout=60
    )
    assert answer.headers["x-request-id"] == "my-id.1"
    line = log.wait(200)
    assert line["id"] == "my-id.1"
    assert (line["event"], line["path"], line["n"], line["user"]) == ("request", "/v1/images/generations", 1, "me")
    assert "secret" not in json.dumps(log.lines)
    answer = httpx2.get(f"{started.url}/v1/nothing", headers={"X-Request-Id": "my id; DROP"})
    assert len(answer.headers["x-request-id"]) == 32
    assert log.wait(404)["id"] == answer.headers["x-request-id"]
    log.lines.clear()
    with start(log_prompts=True) as found, found.client() as client:
        client.images.generate(prompt="a secret")
        assert log.wait(200)["prompt"] == "a secret"


def test_the_log_says_why_the_worker_failed(started: Running, log: Lines) -> None:
    def failing(_: MarsPipeline) -> Order:
        raise ZeroDivisionError

    def failing_later(_: MarsPipeline) -> Iterator[Words]:
        yield Words("a", tokens=1)
        raise ZeroDivisionError

    def refused(_: MarsPipeline) -> Order:
        raise ApiError(400, "no")

    async def receive() -> None:
        await asyncio.Event().wait()

    async def hear(begin: Callable[[MarsPipeline], Order | Iterator[Words]], name: str) -> int:
        request = Request({"type": "http", "mars": {"id": name}}, receive)  # type: ignore[arg-type]
        hearing = Hearing(started.worker, begin, request=request, seconds=60)
        try:
            while True:
                await hearing.next()
        except ApiError as error:
            return error.status_code
        finally:
            hearing.close()

    assert [asyncio.run(hear(begin, begin.__name__)) for begin in (failing, failing_later, refused)] == [500, 500, 400]
    assert [(line["level"], line["event"], line["id"]) for line in log.lines] == [
        ("error", "failed", "failing"), ("error", "failed", "failing_later")
    ]  # fmt: skip
    assert all("ZeroDivisionError" in str(line["error"]) for line in log.lines)


def test_a_stream_that_fails_has_the_status_of_what_failed(start: Start, log: Lines) -> None:
    def look(_: str, image: Image.Image | None) -> str | None:
        return None if image is None else "bad picture"

    with start(moderation=look) as found, found.client() as client:
        with pytest.raises(openai.APIError, match="bad picture"):
            list(client.images.generate(prompt="x", stream=True))
        assert log.wait(400)["path"] == "/v1/images/generations"
