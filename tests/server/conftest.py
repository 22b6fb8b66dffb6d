"""A server of the tiny model in a thread, and OpenAI's own client."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import uvicorn
from openai import OpenAI

from mars.pipeline import MarsPipeline
from mars.server.app import make_app
from mars.server.guard import LOG, JsonLines
from mars.server.serve import bind
from mars.server.settings import Settings
from mars.server.worker import Worker


class Running:
    """A server that answers."""

    def __init__(self, worker: Worker, port: int) -> None:
        self.worker = worker
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)


@contextmanager
def running(pipe: MarsPipeline, settings: Settings) -> Iterator[Running]:
    worker = Worker(pipe, queue=settings.limits.queue)
    listening = bind("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(make_app(worker, settings), log_config=None, access_log=False, lifespan="off", ws="none")
    )
    begun = threading.Event()

    async def answer() -> None:
        task = asyncio.create_task(server.serve(sockets=[listening]))
        while not server.started:
            await asyncio.sleep(0.005)
        begun.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(answer()), daemon=True)
    thread.start()
    assert begun.wait(60)
    try:
        yield Running(worker, listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(60)
        worker.close()
        worker.join(60)
        listening.close()
        assert not thread.is_alive()


Start = Callable[..., AbstractContextManager[Running]]


@pytest.fixture(scope="session")
def started(tiny_model: Path) -> Iterator[Running]:
    """A server that lets everybody ask."""
    with running(MarsPipeline.from_pretrained(tiny_model), Settings()) as found:
        yield found


@pytest.fixture
def start(tiny_model: Path) -> Start:
    """Starts a server with other settings, as a context."""
    return lambda **settings: running(MarsPipeline.from_pretrained(tiny_model), Settings(**settings))


@pytest.fixture
def client(started: Running) -> Iterator[OpenAI]:
    """OpenAI's client of the server."""
    with started.client() as found:
        yield found


class Lines(logging.Handler):
    """What was logged, as a server would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, object]] = []
        self.setFormatter(JsonLines())

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))

    def wait(self, status: int) -> dict[str, object]:
        """The latest line with a status; it is written after the answer was sent."""
        for _ in range(1000):
            found = [line for line in self.lines if line.get("status") == status]
            if found:
                return found[-1]
            time.sleep(0.01)
        raise AssertionError(self.lines)


@pytest.fixture
def log() -> Iterator[Lines]:
    lines = Lines()
    LOG.addHandler(lines)
    LOG.setLevel(logging.INFO)
    yield lines
    LOG.removeHandler(lines)
