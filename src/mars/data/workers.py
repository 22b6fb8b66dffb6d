"""Work in several processes, with results in order; a process that dies is replaced, and what killed it is named."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_WAITING = 4
"""Items per worker that are read ahead."""


class WorkerDied:
    """In place of a result: the item ended its process, the second time all alone."""


def in_order(function: Callable[[T], R], items: Iterable[T], *, workers: int) -> Iterator[tuple[T, R | WorkerDied]]:
    """Yields each item with its result, in the order of the items, reading only a few items ahead.

    Where a process dies (the kernel takes it when memory runs out, a library crashes), what was under way is done
    again, one item at a time.

    Args:
        function: picklable; its errors are raised here.
        workers: processes; 0 does the work in this one.
    """
    if workers == 0:
        for item in items:
            yield item, function(item)
        return
    source, waiting = iter(items), deque[tuple[T, Future[R]]]()
    pool = _pool(workers)
    try:
        while True:
            ahead = islice(source, _WAITING * workers - len(waiting))
            waiting.extend((item, _submitted(pool, function, item)) for item in ahead)
            if not waiting:
                return
            item, future = waiting[0]
            if isinstance(future.exception(), BrokenProcessPool):
                pool.shutdown()
                yield from _one_by_one(function, waiting)
                waiting.clear()
                pool = _pool(workers)
            else:
                waiting.popleft()
                yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _one_by_one(
    function: Callable[[T], R], waiting: Iterable[tuple[T, Future[R]]]
) -> Iterator[tuple[T, R | WorkerDied]]:
    pool = _pool(1)
    try:
        for item, future in waiting:
            if isinstance(future.exception(), BrokenProcessPool):
                future = _submitted(pool, function, item)
            if isinstance(future.exception(), BrokenProcessPool):
                pool.shutdown()
                pool = _pool(1)
                yield item, WorkerDied()
            else:
                yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _submitted(pool: ProcessPoolExecutor, function: Callable[[T], R], item: T) -> Future[R]:
    try:
        return pool.submit(function, item)
    except BrokenProcessPool as error:
        failed = Future[R]()
        failed.set_exception(error)
        return failed


def _pool(workers: int) -> ProcessPoolExecutor:
    """Of fresh processes: a copy of this one would have its threads' locks in any state."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)


def _begin() -> None:
    """A worker ends with its parent, even if that is killed, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
