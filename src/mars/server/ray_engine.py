"""Drawing on a cluster: replicas by Ray Serve, each a worker with the whole model, behind one app.

The app is the one of a single machine, and so are keys, limits, queue, figures and log: only where it hands a request
to a worker, Ray hands it to a replica that has room, or to the first that comes to have it. A replica that dies is
replaced by Ray, and what it had in hand is done again by another: an order has its seeds, so it is the same pictures,
and of what was told before nothing is told twice.
"""

import asyncio
import logging
import os
import traceback
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from mars.checkpoint import MarsModel
from mars.errors import MarsError, RequestError
from mars.image_tokenizer.model import ImageTokenizer
from mars.memory import keep_little
from mars.model.transformer import MarsTransformer
from mars.pipeline import MarsPipeline
from mars.pipeline.drawings import Drawn, Preview
from mars.pipeline.orders import Order
from mars.pipeline.writing import Piece
from mars.server.errors import ApiError
from mars.server.guard import LOG
from mars.server.worker import Begun, Ended, Intake, Job, News, Refused, Worker

APP = "mars"
_WHY = "a replica cannot open its model: "
ONGOING = 16
"""Requests that a replica has in hand: a batch and what comes next. Others wait where any replica can take them."""
TARGET = 8
"""Requests in hand of a replica that autoscaling aims at."""
ATTEMPTS = 5
"""Replicas that may die with one request in hand, lest it ends them one after the other for ever."""


class Replica:
    """A worker in a process of its own; `opening` gives its pipeline."""

    def __init__(self, opening: Callable[[], MarsPipeline]) -> None:
        keep_little()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        try:
            self.worker = Worker(opening(), queue=2**31)  # the app has counted
        except MarsError as error:
            raise RuntimeError(f"{_WHY}{error}") from None

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if not self.worker.ready:
            raise RuntimeError("the worker's thread has ended")

    def about(self) -> MarsModel:
        """The model without its weights."""
        return hollow(self.worker.pipe.model)

    def rows(self) -> int:
        """Rows of the batch that runs."""
        return self.worker.rows

    async def work(
        self, begin: Callable[[MarsPipeline], Order | Iterator[Piece]], previews: int
    ) -> AsyncGenerator[News, None]:
        """All news of a request; who hears no more of them has it forgotten."""
        job = self.worker.submit(begin, previews=previews)
        try:
            while True:
                news = await job.news.get()
                yield Refused(_portable(news.error)) if isinstance(news, Refused) else news
                if isinstance(news, Drawn | Ended | Refused):
                    return
        finally:
            self.worker.cancel(job)


def hollow(model: MarsModel) -> MarsModel:
    """A model without weights: its tokenizer and what it says about itself."""
    with torch.device("meta"):
        transformer = MarsTransformer(model.transformer.config)
        image_tokenizer = ImageTokenizer(model.image_tokenizer.config)
    return replace(model, transformer=transformer, image_tokenizer=image_tokenizer)


def _portable(error: Exception) -> Exception:
    """An error that another process can read; for those that are not meant, how they came about as text."""
    if isinstance(error, MarsError | ApiError):
        return error
    return RuntimeError("".join(traceback.format_exception(error)))


@dataclass
class _Told:
    """What of a request was told, so that it is not told again."""

    begun: bool = False
    previews: set[tuple[int, int]] = field(default_factory=set)
    pieces: int = 0

    def is_new(self, news: News, *, number: int) -> bool:
        """Whether it was not told; `number` counts the pieces of this attempt."""
        match news:
            case Begun():
                known, self.begun = self.begun, True
                return not known
            case Preview():
                known = (news.picture, news.number) in self.previews
                self.previews.add((news.picture, news.number))
                return not known
            case Drawn() | Ended() | Refused():
                return True
        new = number > self.pieces
        self.pieces = max(self.pieces, number)
        return new


def _same(_: MarsPipeline, *, order: Order) -> Order:
    return order


class RayWorker(Intake):
    """Hands requests to replicas, by a handle of Ray Serve."""

    def __init__(self, handle: Any, pipe: MarsPipeline, *, queue: int) -> None:
        super().__init__(pipe, queue=queue)
        self._handle = handle
        self._tasks: dict[Job, asyncio.Task[None]] = {}
        self._counting: asyncio.Task[None] | None = None

    def cancel(self, job: Job) -> None:
        """Forgets a request, whose rows are free before the next step; one that is done is no error."""
        if job in self._tasks:
            self._tasks[job].cancel()

    def _take(self, job: Job) -> None:
        self._tasks[job] = asyncio.create_task(self._follow(job))
        if self._counting is None:
            self._counting = asyncio.create_task(self._count_rows())

    async def _follow(self, job: Job) -> None:
        """Tells of a request until it is done, whatever becomes of replicas."""
        last: News
        try:
            last = await self._attempts(job)
        except asyncio.CancelledError:
            self._leave(job)
            raise
        except Exception as error:  # of Ray: none of ours comes as one
            last = Refused(error)
        self._leave(job)
        job.news.put_nowait(last)

    def _leave(self, job: Job) -> None:
        del self._tasks[job]
        self._free(job)

    async def _attempts(self, job: Job) -> News:
        from ray.exceptions import ActorDiedError, ActorUnavailableError

        begin, told = job.begin, _Told()
        for attempt in range(1, ATTEMPTS + 1):
            stream = self._handle.options(stream=True).work.remote(begin, job.previews)
            number = 0
            try:
                async for news in stream:
                    if isinstance(news, Drawn | Ended | Refused):
                        return news
                    if isinstance(news, Begun) and news.order is not None:
                        begin = partial(_same, order=news.order)
                    number += not isinstance(news, Begun | Preview)
                    if told.is_new(news, number=number):
                        job.news.put_nowait(news)
            except asyncio.CancelledError:
                stream.cancel()
                raise
            except (ActorDiedError, ActorUnavailableError) as error:
                stream.cancel()  # one that only cannot be reached need not go on
                reason = " ".join(str(error).split())[:300]
                LOG.warning("replica lost", extra={"fields": {"attempt": attempt, "reason": reason}})
        raise ApiError(503, f"{ATTEMPTS} replicas ended while they did this; ask for something else")

    async def _count_rows(self) -> None:
        """Asks replicas for their rows, while there is anything to do, or one of them still draws."""
        while self._tasks or self.rows:
            with suppress(Exception):  # one that dies; figures must not end what is drawn
                self.rows = sum(await self._handle.broadcast("rows").results_async(timeout_s=5))
            await asyncio.sleep(1)
        self._counting = None


@contextmanager
def ray_worker(
    opening: Callable[[], MarsPipeline], *, queue: int, replicas: int, max_replicas: int
) -> Iterator[RayWorker]:
    """A worker by replicas on the cluster that RAY_ADDRESS names, else on this machine; they end with the context.

    Args:
        opening: gives a replica its pipeline; where it runs the model must be found, too.
        replicas: at least so many, each on one core.
        max_replicas: Ray starts up to so many while much is asked for.

    Raises:
        RequestError: if Ray is not installed, or there is no such cluster.
        MarsError: as `opening` does.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # else a thread of Serve starts Ray again when it has ended
    try:
        from ray import serve
    except ImportError:
        raise RequestError("the engine `ray` needs Ray Serve; install it: pip install 'mars-t2i[ray]'") from None
    with _cluster(max(max_replicas, os.cpu_count() or 1)):
        try:
            serve.start(proxy_location="Disabled")
            handle = serve.run(_application(opening, replicas, max_replicas), name=APP, route_prefix=None)
            about = handle.about.remote().result()
        except RuntimeError as error:
            raise RequestError(_why(error)) from error
        try:
            yield RayWorker(handle, MarsPipeline(about), queue=queue)
        finally:
            handle.shutdown()  # type: ignore[no-untyped-call]
            serve.delete(APP)


@contextmanager
def _cluster(cores: int) -> Iterator[None]:
    """Ray, on a cluster that is there or on this machine with so many cores to hand out."""
    import ray

    ours = "RAY_ADDRESS" not in os.environ
    try:
        ray.init(
            num_cpus=cores if ours else None, include_dashboard=False if ours else None, log_to_driver=False,
            logging_level=logging.ERROR,
        )  # fmt: skip
    except Exception as error:  # Ray has no class for a cluster that does not start
        raise RequestError(f"Ray could not be reached or started: {' '.join(str(error).split())[:300]}") from error
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def _why(error: Exception) -> str:
    """Why there are no replicas, as one of them said it, or else Ray."""
    from ray import serve

    application = serve.status().applications.get(APP)
    said = "" if application is None else " ".join(one.message for one in application.deployments.values())
    _, found, message = said.partition(_WHY)
    return message.splitlines()[0] if found else f"Ray could not start replicas: {' '.join(str(error).split())[:300]}"


def _application(opening: Callable[[], MarsPipeline], replicas: int, max_replicas: int) -> Any:
    """Replicas for Ray Serve."""
    from ray import serve

    scale: dict[str, Any] = {"num_replicas": replicas}
    if max_replicas > replicas:
        scale = {
            "autoscaling_config": {
                "min_replicas": replicas, "max_replicas": max_replicas, "target_ongoing_requests": TARGET,
            }
        }  # fmt: skip
    made: Any = serve.deployment(
        Replica, name="Replica", max_ongoing_requests=ONGOING, ray_actor_options={"num_cpus": 1},
        health_check_period_s=5, max_constructor_retry_count=3, logging_config={"log_level": "ERROR"}, **scale,
    )  # fmt: skip
    return made.bind(opening)
