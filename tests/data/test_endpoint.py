"""The captioner against a real server in a thread that misbehaves on purpose."""

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mars.data.endpoint import PROMPTS, Endpoint
from mars.data.recaption import NoAnswer, UnusableAnswer, recaption
from mars.data.shard_folder import ShardFolder
from mars.data.shards import Caption, Picture, Record, read_pictures
from mars.errors import DataError
from tests.data.conftest import art, encoded

TEXTS = {
    "en": "A soft field of colours that run into each other, with a bright patch in the upper left corner.",
    "zh": "一片柔和的色彩相互交融，左上角有一块明亮的区域，没有任何文字。",
}


@dataclass
class Reply:
    status: int = 200
    body: Any = None
    """JSON, or bytes as they are."""
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0


def says(text: str | None, *, finish: str = "stop", **message: object) -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return Reply(body={"object": "chat.completion", "choices": [choice]})


def language_of_request(body: dict[str, Any]) -> str:
    asked = body["messages"][0]["content"][0]["text"]
    return next(language for language, prompt in PROMPTS.items() if prompt == asked)


def well(body: dict[str, Any]) -> Reply:
    return says(TEXTS[language_of_request(body)])


@dataclass
class Server:
    url: str = ""
    replies: list[Reply | Callable[[dict[str, Any]], Reply]] = field(default_factory=list)
    """Given one after the other; then `otherwise`."""
    otherwise: Callable[[dict[str, Any]], Reply] = well
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    busy: int = 0
    most_busy: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # an answer leaves whole

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with state.lock:
                state.times.append(time.monotonic())
                state.bodies.append(body)
                state.headers.append({name.lower(): value for name, value in self.headers.items()})
                state.busy += 1
                state.most_busy = max(state.most_busy, state.busy)
                reply = state.replies.pop(0) if state.replies else state.otherwise
            reply = reply if isinstance(reply, Reply) else reply(body)
            time.sleep(reply.delay)
            with state.lock:
                state.busy -= 1
            content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            try:
                self.send_response(reply.status)
                for name, value in {"content-length": str(len(content)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # nobody waits any more
                self.close_connection = True

        def log_message(self, *args: object) -> None:
            """Nothing."""

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    listening.handle_error = lambda *_: None  # type: ignore[method-assign]
    state.url = f"http://127.0.0.1:{listening.server_port}/v1"
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    listening.shutdown()
    listening.server_close()
    thread.join()


def picture(number: int = 0, *, size: tuple[int, int] = (64, 48), image: Image.Image | None = None) -> Picture:
    captions = (Caption(text=f"picture {number}", language="en", kind="original"),)
    record = Record(
        key=f"p{number}", concept="", style="", split="train", source="test", licence="CC0-1.0", captions=captions
    )
    return Picture(record=record, content=encoded(image or art(number, size=size)))


def ask(url: str, one: Picture | None = None, *, language: str = "en", attempt: int = 0, **options: Any) -> str:
    async def asked() -> str:
        endpoint = Endpoint(url, model="seer", **{"backoff": 0.01, "per_minute": 60_000, **options})
        try:
            return await endpoint.caption(one or picture(), language=language, attempt=attempt)
        finally:
            await endpoint.close()

    return asyncio.run(asked())


def test_the_request_is_openais_with_the_picture_inside(server: Server) -> None:
    assert ask(server.url, picture(size=(200, 100)), language="zh", key="secret", side=50) == TEXTS["zh"]
    [body], [headers] = server.bodies, server.headers
    assert headers["authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"]) == ("seer", 0)
    assert body["max_tokens"] > 0
    text, image = body["messages"][0]["content"]
    assert text == {"type": "text", "text": PROMPTS["zh"]}
    kind, _, content = image["image_url"]["url"].partition("base64,")
    assert kind == "data:image/jpeg;"
    shown = Image.open(io.BytesIO(base64.b64decode(content)))
    assert (shown.format, shown.size, shown.mode) == ("JPEG", (50, 25), "RGB")


def test_without_a_key_none_is_sent_and_small_pictures_are_not_enlarged(server: Server) -> None:
    ask(server.url + "/", picture(image=Image.new("RGBA", (20, 20))))
    assert "authorization" not in server.headers[0]
    url = server.bodies[0]["messages"][0]["content"][1]["image_url"]["url"]
    shown = Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2])))
    assert shown.size == (20, 20)
    assert shown.getpixel((9, 9)) == (255, 255, 255)  # what is transparent is white


@pytest.mark.parametrize(
    "trouble",
    [
        Reply(500, b"oops"),
        Reply(502, b"<html>bad gateway</html>"),
        Reply(503, {"error": "loading"}),
        Reply(429, {"error": "slow down"}),
        Reply(200, b"not json"),
        Reply(200, {"choices": []}),
        Reply(200, [1]),
        Reply(200, b""),
        Reply(200, b"\xff\xfe{"),
        Reply(200, b"short", headers={"content-length": "999", "connection": "close"}),
        Reply(200, {}, delay=1.0),
    ],
    ids=["500", "502", "503", "429", "no json", "no choices", "a list", "empty", "bytes", "cut short", "too slow"],
)
def test_trouble_passes(server: Server, trouble: Reply) -> None:
    server.replies = [trouble, trouble]
    assert ask(server.url, timeout=0.5) == TEXTS["en"]
    assert len(server.bodies) >= 3


def test_trouble_that_stays_is_told_with_its_last_reason(server: Server) -> None:
    server.otherwise = lambda _: Reply(503, b"the model is\n loading")
    with pytest.raises(NoAnswer, match="HTTP 503: the model is loading, 3 times"):
        ask(server.url, tries=3)
    assert len(server.bodies) == 3


def test_a_server_that_is_not_there_is_told() -> None:
    with pytest.raises(NoAnswer, match="ConnectError"):
        ask("http://127.0.0.1:1/v1", tries=2)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_picture_would_change_ends_the_run_and_keeps_the_key_secret(server: Server, status: int) -> None:
    server.otherwise = lambda _: Reply(status, b"no such key: secret-key")
    with pytest.raises(DataError, match=f"HTTP {status}.*check the URL") as caught:
        ask(server.url, key="secret-key")
    assert "secret" not in str(caught.value)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "reply",
    [
        Reply(400, {"error": {"code": "content_policy_violation"}}),
        Reply(413, b"too large"),
        says(None),
        says(None, refusal="I will not."),
        says("", finish="content_filter"),
        says("A very long", finish="length"),
    ],
    ids=["policy", "too large", "nothing", "refusal", "filter", "cut off"],
)
def test_what_concerns_one_picture_is_not_tried_again_by_the_endpoint(server: Server, reply: Reply) -> None:
    server.otherwise = lambda _: reply
    with pytest.raises(UnusableAnswer):
        ask(server.url)
    assert len(server.bodies) == 1


def test_retry_after_is_obeyed_as_seconds_and_as_a_date(server: Server) -> None:
    server.replies = [Reply(429, {}, {"retry-after": "0.4"})]
    ask(server.url)
    assert server.times[1] - server.times[0] >= 0.4
    due = int(time.time()) + 2
    server.replies = [Reply(503, {}, {"retry-after": formatdate(due, usegmt=True)})]
    ask(server.url)
    assert time.time() >= due
    server.replies = [Reply(503, {}, {"retry-after": "soon"})]
    ask(server.url)


def test_requests_are_paced(server: Server) -> None:
    began = time.monotonic()

    async def several() -> None:
        endpoint = Endpoint(server.url, model="seer", per_minute=600)
        await asyncio.gather(*(endpoint.caption(picture(), language="en", attempt=0) for _ in range(4)))
        await endpoint.close()

    asyncio.run(several())
    assert server.times[-1] - began >= 0.3  # three gaps of 0.1 s


@pytest.mark.parametrize("url", ["", "seer", "ftp://host/v1", "http://"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(DataError, match="must be a URL such as"):
        Endpoint(url, model="seer")


def test_a_whole_set_survives_a_server_that_misbehaves(server: Server, tmp_path: Path) -> None:
    bad = [
        Reply(500, b""),
        Reply(429, {}, {"retry-after": "0.05"}),
        Reply(200, b"garbage"),
        says("I'm sorry, I can't help with that."),
        says("Извините, на этой картинке нарисован дом"),
        Reply(200, {}, delay=1.3),
    ]
    server.replies = [one for each in bad for one in (well, each, well)]
    pictures = [picture(number) for number in range(12)]
    with ShardFolder(tmp_path / "in", settings={}) as folder:
        for place, one in enumerate(pictures):
            folder.add(one, consumed=place)
        folder.finish()
    endpoint = Endpoint(server.url, model="seer", backoff=0.01, per_minute=60_000, timeout=1, at_once=3)
    out, cache = tmp_path / "out", tmp_path / "cache.sqlite"
    done = recaption(tmp_path / "in", out=out, captioner=endpoint, languages=["en", "zh"], cache=cache)
    assert (done.pictures, done.failed, done.asked) == (12, 0, 24)
    assert len(server.bodies) >= 24 + len(bad)
    assert server.most_busy <= 3 + 1  # a request that was given up may still be served
    for old, new in zip(pictures, read_pictures(out), strict=True):
        assert new.content == old.content
        dense = [Caption(text=TEXTS[language], language=language, kind="dense") for language in ("en", "zh")]
        assert new.record.captions == (*old.record.captions, *dense)
