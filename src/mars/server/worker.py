"""One thread owns the pipeline: it draws orders and writes texts side by side, and tells of them through queues.

Requests come in and are cancelled from the event loop's thread; everything else here happens in the worker's.
"""

import asyncio
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from queue import Empty, SimpleQueue

from mars.generation.prompts import Prompts
from mars.memory import give_back
from mars.pipeline import MarsPipeline
from mars.pipeline.drawings import Drawing, DrawingFailed, Drawings, Drawn, Preview
from mars.pipeline.orders import Order
from mars.pipeline.writing import Piece
from mars.server.errors import ApiError

PAUSE = 1.0
"""Seconds without a request after which memory is given back."""
MAX_WRITERS = 4
"""Texts that are written at once, as each has a cache of its own; others wait."""


@dataclass(frozen=True)
class Begun:
    """What was asked for can be done."""

    order: Order | None
    """Null for a text."""


@dataclass(frozen=True)
class Ended:
    """A text is done."""


@dataclass(frozen=True)
class Refused:
    """It cannot be done, or failed."""

    error: Exception


@dataclass(frozen=True)
class Gone:
    """The client hung up."""


News = Begun | Preview | Drawn | Piece | Ended | Refused | Gone


@dataclass(eq=False, kw_only=True)
class Job:
    """A request on its way through the worker."""

    begin: Callable[[MarsPipeline], Order | Iterator[Piece]]
    """Runs in the worker's thread: pictures to draw, or a text that is written piece by piece, of which nothing is
    done before it is asked for its first piece."""
    size: int
    """Places in the queue."""
    previews: int
    news: "asyncio.Queue[News]" = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    begun: bool = False
    """Of a text, whether it has told of anything."""
    cancelled: bool = False

    def tell(self, news: News) -> None:
        """Puts news into the queue, from the worker's thread."""
        with suppress(RuntimeError):  # the loop was closed: nobody listens
            self.loop.call_soon_threadsafe(self.news.put_nowait, news)


class Intake(ABC):
    """Takes requests in, as long as there are places in its queue.

    Args:
        queue: at most so many pictures and texts at once, those that wait included.
    """

    def __init__(self, pipe: MarsPipeline, *, queue: int) -> None:
        self.pipe = pipe
        self.queue = queue
        self.rows = 0
        """Rows of the batch that runs."""
        self.held = 0
        """Places of the queue that are taken."""
        self._lock = threading.Lock()
        self._closing = False
        self._pace = 1.0
        """Seconds between two places of the queue that come free while it is in use; a moving mean."""
        self._freed = time.monotonic()

    @property
    def ready(self) -> bool:
        """Whether more can be asked for."""
        return not self._closing

    def submit(
        self, begin: Callable[[MarsPipeline], Order | Iterator[Piece]], *, size: int = 1, previews: int = 0
    ) -> Job:
        """Takes a request in; call it in the event loop, in which its news are told.

        Raises:
            ApiError: 429 if the queue is full, 503 if the server is about to end.
        """
        with self._lock:
            if not self.ready:
                raise ApiError(503, "the server is shutting down; ask again later", headers={"Retry-After": "5"})
            if self.held + size > self.queue:
                seconds = min(60, math.ceil(self._pace * (self.held + size - self.queue)))
                raise ApiError(
                    429, f"the queue is full; ask again in {seconds} s", headers={"Retry-After": str(seconds)}
                )
            if not self.held:
                self._freed = time.monotonic()
            self.held += size
            job = Job(begin=begin, size=size, previews=previews)
            self._take(job)
        return job

    def _free(self, job: Job) -> None:
        with self._lock:
            self.held -= job.size
        now = time.monotonic()
        self._pace += 0.2 * ((now - self._freed) / job.size - self._pace)
        self._freed = now

    @abstractmethod
    def _take(self, job: Job) -> None:
        """Sees to a request that has its places."""

    @abstractmethod
    def cancel(self, job: Job) -> None:
        """Forgets a request, whose rows are free before the next step; one that is done is no error."""

    def close(self) -> None:
        """Takes nothing more."""
        with self._lock:
            self._closing = True


class Worker(Intake):
    """Draws and writes for all requests of a server.

    Prompts are read one by one, so that a picture does not depend on what is asked for beside it.
    """

    def __init__(self, pipe: MarsPipeline, *, queue: int) -> None:
        super().__init__(pipe, queue=queue)
        pipe.prompts = Prompts(pipe.model.transformer, together=0)
        self._inbox: SimpleQueue[Job | None] = SimpleQueue()
        """Null only wakes the thread."""
        self._drawings = Drawings(pipe)
        self._drawing: dict[Drawing, Job] = {}
        self._writing: dict[Job, Iterator[Piece]] = {}
        """In the order in which they were asked for."""
        self._thread = threading.Thread(target=self._run, name="mars-worker", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether more can be asked for."""
        return super().ready and self._thread.is_alive()

    def cancel(self, job: Job) -> None:
        """Forgets a request, whose rows are free before the next step; one that is done is no error."""
        job.cancelled = True
        self._inbox.put(None)

    def close(self) -> None:
        """Takes nothing more; the thread ends when all that was taken in is done."""
        super().close()
        self._inbox.put(None)

    def join(self, seconds: float | None = None) -> None:
        """Waits for the end."""
        self._thread.join(seconds)

    def _take(self, job: Job) -> None:
        self._inbox.put(job)

    def _run(self) -> None:
        while self._take_in():
            self._forget_cancelled()
            if self._drawings.busy:
                self._draw()
            for job in list(islice(self._writing, MAX_WRITERS)):
                self._write(job)
            self.rows = self._drawings.scheduler.rows

    def _take_in(self) -> bool:
        """One request at most, as it may take a moment; waits where there is nothing to do. False at the end."""
        while True:
            idle = not (self._drawings.busy or self._writing)
            if idle and self._closing and self._inbox.empty():
                return False
            try:
                job = self._rest() if idle else self._inbox.get_nowait()
            except Empty:
                return True
            if job is not None:
                self._begin(job)
                return True
            if not idle:
                return True

    def _rest(self) -> Job | None:
        """The next request, however late; memory of those before is given back when none comes soon."""
        try:
            return self._inbox.get(timeout=PAUSE)
        except Empty:
            give_back()
            return self._inbox.get()

    def _begin(self, job: Job) -> None:
        if job.cancelled:
            self._free(job)
            return
        try:
            found = job.begin(self.pipe)
            if isinstance(found, Order):
                self._drawing[self._drawings.submit(found, previews=job.previews)] = job
                job.tell(Begun(found))
            else:
                self._writing[job] = found
        except Exception as error:  # whatever it is, others go on
            self._end(job, Refused(error))

    def _draw(self) -> None:
        try:
            told = self._drawings.step()
        except Exception as error:  # a failure of ours; all that ran is lost, and what comes is not
            self._drawings = Drawings(self.pipe)
            for job in self._drawing.values():
                self._end(job, Refused(error))
            self._drawing.clear()
            return
        for news in told:
            match news:
                case Preview():
                    self._drawing[news.drawing].tell(news)
                case Drawn():
                    self._end(self._drawing.pop(news.drawing), news)
                case DrawingFailed():
                    self._end(self._drawing.pop(news.drawing), Refused(news.error))

    def _write(self, job: Job) -> None:
        """One more piece of a text."""
        told: News
        try:
            told = next(self._writing[job], Ended())
        except Exception as error:  # whatever it is, others go on
            told = Refused(error)
        if not job.begun and not isinstance(told, Refused):
            job.begun = True
            job.tell(Begun(None))
        if isinstance(told, Ended | Refused):
            del self._writing[job]
            self._end(job, told)
        else:
            job.tell(told)

    def _forget_cancelled(self) -> None:
        for drawing, job in list(self._drawing.items()):
            if job.cancelled:
                self._drawings.cancel(drawing)
                del self._drawing[drawing]
                self._free(job)
        for job in [job for job in self._writing if job.cancelled]:
            del self._writing[job]
            self._free(job)
        self.rows = self._drawings.scheduler.rows

    def _end(self, job: Job, news: News) -> None:
        self._free(job)
        job.tell(news)
