"""What every request passes: an id, its key, limits of size and time, a line in the log, and figures."""

import asyncio
import json
import logging
import re
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mars.server.errors import ApiError
from mars.server.metrics import Metrics
from mars.server.settings import Settings

PUBLIC = ("/health", "/ready", "/metrics", "/openapi.json", "/docs")
"""Addresses that need no key."""
PAGE = re.compile(r"/(|sign-in|(en|zh)(/.*)?)", flags=re.DOTALL)
"""Those of the page, whose own door asks for it."""
LOG = logging.getLogger("mars.server")
_ID = re.compile(r"[\w.-]{1,64}", flags=re.ASCII)


class JsonLines(logging.Formatter):
    """A log record as one JSON object; what stands in its `fields` is added."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class Guard:
    """ASGI middleware around the whole app.

    A body is read here, whole, before anything looks at it: one that is too large or too slow is refused.
    `scope["mars"]` is a table to which endpoints add what the log is to say.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings, metrics: Metrics) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self.open = 0
        """Requests that are under way."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI calls it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        fields: dict[str, Any] = {"id": given if _ID.fullmatch(given) else uuid.uuid4().hex}
        scope["mars"] = fields
        began, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = fields["id"]
            await send(message)

        self.open += 1
        try:
            await self._pass(scope, receive, answer)
        except ApiError as error:
            await error.response()(scope, receive, answer)
        except Exception:
            LOG.exception("failed", extra={"fields": {"id": fields["id"]}})
            if not status:
                await ApiError(500, "the server failed; its log says why, under the id of this request").response()(
                    scope, receive, answer
                )
            status = 500
        finally:
            self.open -= 1
            self._tell(scope, fields, status=fields.pop("status", status), seconds=time.perf_counter() - began)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, limits = Headers(scope=scope), self.settings.limits
        public = scope["path"] in PUBLIC
        asks = self.settings.page and PAGE.fullmatch(scope["path"])
        if not (public or asks) and self.settings.keys and not self.settings.keys.fit(_authorization(headers)):
            raise ApiError(
                401, "an API key must be given, as `Authorization: Bearer KEY`, and be one that the server knows",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        if not public and self.open > limits.requests:
            raise ApiError(429, "too many requests are open; ask again in 1 s", headers={"Retry-After": "1"})
        try:
            async with asyncio.timeout(limits.body_seconds):
                body = await _read(receive, limit=limits.body)
        except TimeoutError:
            raise ApiError(408, f"a request must arrive within {limits.body_seconds:g} s") from None
        if body is None:
            scope["mars"]["status"] = 499
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def _tell(self, scope: Scope, fields: dict[str, Any], *, status: int, seconds: float) -> None:
        path = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(path, str(status)).inc()
        self.metrics.seconds.labels(path).observe(seconds)
        about = {"method": scope["method"], "path": scope["path"], "status": status, "seconds": round(seconds, 4)}
        quiet = scope["path"] in PUBLIC or PAGE.fullmatch(scope["path"])  # acts on the page have lines of their own
        LOG.log(logging.DEBUG if quiet else logging.INFO, "request", extra={"fields": fields | about})


def _authorization(headers: Headers) -> bytes:
    return headers.get("authorization", "").encode("latin-1")


async def _read(receive: Receive, *, limit: int) -> bytes | None:
    """A body, or null if the client hung up; what is beyond the limit is read, so that the refusal is, and dropped."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size <= limit:
            parts.append(part)
        else:
            parts.clear()
        if not message.get("more_body", False):
            break
    if size > limit:
        raise ApiError(413, f"a request must have at most {limit:,} bytes, got {size:,}; send a smaller picture")
    return b"".join(parts)
