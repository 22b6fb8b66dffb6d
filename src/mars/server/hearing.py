"""The news of one request, as its endpoint hears them: until it is done, too late, or the client hangs up."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mars.pipeline import MarsPipeline
from mars.pipeline.orders import Order
from mars.pipeline.writing import Piece
from mars.server.errors import ApiError, ClientGoneError, refusal
from mars.server.guard import LOG
from mars.server.worker import Gone, Intake, News, Refused


class Hearing:
    """A request on its way. `close` it in the end, however it ends: that frees what it holds.

    Args:
        request: whose client is watched.
        seconds: for all of it.

    Raises:
        ApiError: if the queue is full.
    """

    def __init__(
        self,
        worker: Intake,
        begin: Callable[[MarsPipeline], Order | Iterator[Piece]],
        *,
        request: Request,
        seconds: float,
        size: int = 1,
        previews: int = 0,
    ) -> None:
        self.worker = worker
        self.request = request
        self.seconds = seconds
        self.job = worker.submit(begin, size=size, previews=previews)
        self.deadline = asyncio.get_running_loop().time() + seconds
        self._watch = asyncio.create_task(self._wait_for_hang_up(request))

    async def next(self) -> News:
        """The next news.

        Raises:
            ApiError: if it cannot be done, failed, or takes too long.
            ClientGoneError: if nobody waits any more.
        """
        try:
            async with asyncio.timeout_at(self.deadline):
                news = await self.job.news.get()
        except TimeoutError:
            raise ApiError(504, f"this took more than {self.seconds:g} s; ask for less, or again later") from None
        if isinstance(news, Gone):
            raise ClientGoneError
        if isinstance(news, Refused):
            refused = refusal(news.error)
            if refused.status_code >= 500:
                LOG.error("failed", exc_info=news.error, extra={"fields": {"id": self.request.scope["mars"]["id"]}})
            raise refused from news.error
        return news

    def note(self, error: ApiError) -> None:
        """Gives the request's line in the log the status of an error that is told inside a stream."""
        self.request.scope["mars"]["status"] = error.status_code

    def close(self) -> None:
        """Lets go of all that is held; done twice, it is no error."""
        self.worker.cancel(self.job)
        self._watch.cancel()

    async def _wait_for_hang_up(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.worker.cancel(self.job)
        self.job.news.put_nowait(Gone())


class EventStream(Response):
    """Server-sent events of a hearing, which ends with it. A client that does not read is too late in the end, too."""

    def __init__(self, events: AsyncIterator[bytes], hearing: Hearing) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self.events = events
        self.hearing = hearing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's
        """As ASGI calls it."""
        try:
            async with asyncio.timeout_at(self.hearing.deadline + 5):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for event in self.events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (ClientGoneError, TimeoutError):
            scope["mars"]["status"] = 499
        finally:
            self.hearing.close()
