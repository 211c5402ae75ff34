"""Where jobs run: in this process, or in workers; anything with such a `map` can stand in their place."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .errors import OptionError, TrainingError

__all__ = ["Executor", "Finished", "Local", "WorkerDied", "Workers", "end_with_parent"]

T = TypeVar("T")


class WorkerDied(TrainingError):
    """The process that ran a job is gone: killed, or out of memory."""


@dataclass(frozen=True)
class Finished:
    """A job that came to an end: `value` is what the work returned, or `error` what it raised."""

    item: Any
    value: Any = None
    error: BaseException | None = None


class Executor(Protocol):
    """Runs work on items.

    `work` and items can be pickled, and the work writes its own results, so that an engine over many machines needs no
    more than a folder that they share.
    """

    def map(self, work: Callable[[T], Any], items: Sequence[T]) -> Iterator[Finished]:
        """Each item once, in any order; an item whose worker dies comes back with `WorkerDied`, and it alone."""
        ...


class Local:
    """One job after another, in this process."""

    def map(self, work: Callable[[T], Any], items: Sequence[T]) -> Iterator[Finished]:
        for item in items:
            try:
                finished = Finished(item, work(item))
            except Exception as error:
                finished = Finished(item, error=error)
            yield finished


class Workers:
    """Processes of this machine with one thread each, started anew (never forked), each with its own queue of one.

    A pool that several workers share is broken by the death of one of them, with all that it holds; here the others do
    not notice. Workers end when this process does.

    Args:
        count: of processes.

    Raises:
        OptionError: a count below 1.
    """

    def __init__(self, count: int):
        if count < 1:
            raise OptionError(f"jobs is {count}, expected at least 1")
        self.count = count

    def map(self, work: Callable[[T], Any], items: Sequence[T]) -> Iterator[Finished]:
        waiting, free = deque(items), list[Any]()
        running: dict[Future[Any], tuple[Any, T]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.count:
                    pool, item = free.pop() if free else _worker(), waiting.popleft()
                    running[pool.submit(work, item)] = (pool, item)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    pool, item = running.pop(future)
                    error = future.exception()
                    if isinstance(error, BrokenProcessPool):
                        pool.shutdown(wait=False, kill_workers=True)
                        error = WorkerDied("its process was killed, or ran out of memory")
                    else:
                        free.append(pool)
                    yield Finished(item, None if error is not None else future.result(), error)
        finally:
            for pool, _ in running.values():
                pool.shutdown(wait=False, kill_workers=True)
            for pool in free:
                pool.shutdown(wait=True)


def _worker() -> Any:
    from joblib.externals.loky import ProcessPoolExecutor

    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return ProcessPoolExecutor(1, timeout=None, env=one, initializer=end_with_parent, initargs=(os.getpid(),))


def end_with_parent(parent: int) -> None:
    """End this process when its parent is gone: nobody would wait for what it computes."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    if hasattr(os, "getppid"):
        threading.Thread(target=watch, daemon=True).start()
