"""Runs the app: binds, answers, and at SIGTERM or SIGINT takes nothing more, ends what was accepted, and is done."""

import logging
import signal
import socket
import sys

import uvicorn

from mars.errors import RequestError
from mars.pipeline import MarsPipeline
from mars.server.app import make_app
from mars.server.guard import LOG, JsonLines
from mars.server.settings import Settings
from mars.server.worker import Intake, Worker


def bind(host: str, port: int) -> socket.socket:
    """A listening address; port 0 takes a free one.

    Raises:
        RequestError: if it cannot be had.
    """
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise RequestError(f"{host}:{port} cannot be listened on ({error}); choose another host or port") from None


def serve(pipe: MarsPipeline, listening: socket.socket, settings: Settings) -> None:
    """Answers requests until a signal ends it; what was accepted then is finished."""
    worker = Worker(pipe, queue=settings.limits.queue)
    answer(worker, listening, settings)
    worker.join()


def answer(worker: Intake, listening: socket.socket, settings: Settings) -> None:
    """Answers with a worker, which takes nothing more in the end."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    LOG.handlers, LOG.propagate = [handler], False
    LOG.setLevel(logging.INFO)
    config = uvicorn.Config(
        make_app(worker, settings), log_config=None, access_log=False, server_header=False, lifespan="off",
        timeout_graceful_shutdown=int(settings.limits.seconds + settings.limits.body_seconds) + 10, ws="none",
        http="h11", loop="asyncio",  # whatever else is installed: strict, bounded, and what was tested
    )  # fmt: skip
    server = uvicorn.Server(config)
    for one in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises a signal again at its end: then it means nothing
        signal.signal(one, lambda *_: None)
    host, port = listening.getsockname()[:2]
    LOG.info("serving", extra={"fields": {"host": host, "port": port, "model": worker.pipe.model.info.name}})
    server.run(sockets=[listening])
    worker.close()
    LOG.info("ended", extra={"fields": {}})
