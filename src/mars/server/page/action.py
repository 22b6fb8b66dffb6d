"""One thing that somebody does on the page, on its way through the worker: what is shown of it, step by step."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.types import Message

from mars.pipeline import MarsPipeline
from mars.pipeline.drawings import Drawn
from mars.pipeline.orders import Order
from mars.pipeline.writing import Piece
from mars.server.errors import ApiError, refusal
from mars.server.guard import LOG
from mars.server.page.words import Words
from mars.server.service import Service
from mars.server.worker import Begun, Ended, News

Status = dict[str, str]
"""`kind` (busy, done or error) and `text`: one line."""
Shown = tuple[Any, Status]
"""What the page shows in the end or half-way, and how it goes."""

NOTHING: Any = {"__type__": "update"}
"""What is shown stays as it is; Gradio's `skip`."""
HEARTBEAT = 1.0
"""Seconds after which the page is told that nothing is new: one that was closed is noticed then."""


class PageError(Exception):
    """What was asked for on the page cannot be done; the message is one of ours, in the page's language."""


async def _never() -> Message:
    """The news of a client of which the page itself notices that it is gone."""
    await asyncio.Event().wait()
    raise AssertionError


@dataclass(kw_only=True)
class Action:
    """It has an id, a line in the log, and figures, as a request has."""

    service: Service
    say: Words
    name: str
    began: float = field(default_factory=time.perf_counter)
    fields: dict[str, Any] = field(default_factory=lambda: {"id": uuid.uuid4().hex})
    """Of its line in the log."""
    begun: bool = False
    """Whether it waits no longer."""

    def __post_init__(self) -> None:
        self.request = Request({"type": "http", "headers": [], "mars": self.fields}, _never)

    async def show(self, steps: AsyncGenerator[Shown]) -> AsyncGenerator[Shown]:
        """All steps; what goes wrong becomes a last one, which says so and leaves what is shown as it is."""
        status = 499
        try:
            async with aclosing(steps) as running:
                async for shown in running:
                    yield shown
            status = 200
        except PageError as error:
            status = 400
            yield NOTHING, {"kind": "error", "text": str(error)}
        except Exception as error:  # whatever it is, the page says so
            refused = refusal(error)
            status = refused.status_code
            if status >= 500 and not isinstance(error, ApiError):
                LOG.error("failed", exc_info=error, extra={"fields": {"id": self.fields["id"]}})
            yield NOTHING, {"kind": "error", "text": self._line(refused)}
        finally:
            self._tell(status)

    async def hear(
        self, begin: Callable[[MarsPipeline], Order | Iterator[Piece]], *, size: int = 1, previews: int = 0
    ) -> AsyncGenerator[News | None]:
        """The worker's news to the end; None where there were none for a second.

        Raises:
            ApiError: if it cannot be done, failed, or takes too long.
        """
        hearing = self.service.ask(self.request, begin, size=size, previews=previews)
        waiting = asyncio.create_task(hearing.next())
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=HEARTBEAT)
                news = waiting.result() if done else None
                self.begun |= isinstance(news, Begun)
                yield news
                if isinstance(news, Drawn | Ended):
                    return
                if done:
                    waiting = asyncio.create_task(hearing.next())
        finally:
            waiting.cancel()
            hearing.close()

    def busy(self, name: str) -> Status:
        """How it goes, once it has begun."""
        return {"kind": "busy", "text": self.say(name if self.begun else "waiting", seconds=round(self.seconds))}

    def done(self) -> Status:
        """It is done."""
        return {"kind": "done", "text": self.say("drawn", seconds=f"{self.seconds:.1f}")}

    @property
    def seconds(self) -> float:
        """Since it was asked for."""
        return time.perf_counter() - self.began

    def _line(self, error: ApiError) -> str:
        match error.status_code:
            case 429:
                return self.say("full", seconds=(error.headers or {}).get("Retry-After", "1"))
            case 503:
                return self.say("ending")
            case 504:
                return self.say("too_slow")
            case 500:
                return self.say("failed", id=self.fields["id"])
        if error.code == "moderation_blocked":
            return self.say("moderated", reason=error.detail.rpartition("moderation: ")[2])
        return self.say("refused", reason=error.detail)

    def _tell(self, status: int) -> None:
        path = f"page/{self.name}"
        self.service.metrics.requests.labels(path, str(status)).inc()
        self.service.metrics.seconds.labels(path).observe(self.seconds)
        about = {"method": "PAGE", "path": path, "status": status, "seconds": round(self.seconds, 4)}
        LOG.info("request", extra={"fields": self.fields | about})
