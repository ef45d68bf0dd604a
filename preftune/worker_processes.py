"""Results of a function of items, such as decoded image files, worked out by worker processes before they are asked for.

    with WorkerProcesses(load, 4) as workers:
        workers.expect([[a, b], [c, d]])   # what will be taken, in this order
        workers.take([a, b])               # load(a), load(b)

What is taken is the same for any number of workers, 0 included. A worker that dies (out of memory, a signal to the whole job)
costs speed alone: the rest is done in this process.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Generic, Self, TypeVar

from preftune.cli.notes import say

Item = TypeVar("Item")
Result = TypeVar("Result")

BATCHES = 2
"""Batches that are worked on ahead of the one that is taken, or more where there are many workers."""


class WorkerProcesses(Generic[Item, Result]):
    """A function whose results are worked out ahead; `function` and its items and results are picklable.

    At most BATCHES batches, or two items for each worker, are in memory beside those that were taken.
    """

    def __init__(self, function: Callable[[Item], Result], number: int) -> None:
        self.function, self.number = function, number
        self._pool: ProcessPoolExecutor | None = None
        self._batches: dict[int, Iterator[Sequence[Item]]] = {}
        self._begun: dict[int, deque[list[tuple[Item, Future[tuple[Result] | None] | None]]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def expect(self, batches: Iterable[Sequence[Item]], stream: int = 0) -> None:
        """Begin to work on batches that will be taken in this order; they replace what was expected of the stream before."""
        if not self.number:
            return
        for batch in self._begun.pop(stream, ()):
            for _, future in batch:
                if future is not None:
                    future.cancel()
        self._batches[stream], self._begun[stream] = iter(batches), deque()
        self._begin(stream)

    def take(self, items: Sequence[Item], stream: int = 0) -> list[Result]:
        """Return the results of a batch; an error of the function is raised here."""
        begun = self._begun.get(stream)
        if not begun:
            return [self.function(item) for item in items]
        batch = begun.popleft()
        assert [item for item, _ in batch] == list(items), "batches are taken in the order that was expected"
        results = [self._result(item, future) for item, future in batch]
        self._begin(stream)
        return results

    def close(self) -> None:
        """End the workers; what is taken later is worked out in this process."""
        self._batches.clear()
        self._begun.clear()
        if self._pool is not None:
            _end(self._pool)
            self._pool = None

    def _result(self, item: Item, future: Future[tuple[Result] | None] | None) -> Result:
        if future is not None and self._pool is not None:
            try:
                if found := future.result():
                    return found[0]
            except BrokenProcessPool:
                self._give_up()
        return self.function(item)  # an error is raised again, here

    def _give_up(self) -> None:
        if self._pool is not None:
            say("a worker process has died; images are decoded in the main process from now on")
            _end(self._pool)
            self._pool = None
        self.number = 0

    def _begin(self, stream: int) -> None:
        """Hand batches to the workers until enough are under way."""
        begun = self._begun[stream]
        while len(begun) < BATCHES or sum(map(len, begun)) < 2 * self.number:
            batch = next(self._batches[stream], None)
            if batch is None:
                return
            begun.append([(item, self._submitted(item)) for item in batch])

    def _submitted(self, item: Item) -> Future[tuple[Result] | None] | None:
        if not self.number:
            return None
        try:
            if self._pool is None:
                self._pool = _start(self.number)
            return self._pool.submit(_attempt, self.function, item)
        except (BrokenProcessPool, OSError):  # OSError: no more processes are allowed
            self._give_up()
            return None


def _end(pool: ProcessPoolExecutor) -> None:
    """End a pool at once: its processes only read, so nothing is lost by killing one that is busy or does not end by itself."""
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()


def _attempt(function: Callable[[Item], Result], item: Item) -> tuple[Result] | None:
    """Return the result in a tuple; None where there was an error, which may not be one that travels between processes."""
    try:
        return (function(item),)
    except Exception:
        return None


def _start(workers: int) -> ProcessPoolExecutor:
    """Return worker processes. Under Linux they are forked, which takes milliseconds: they touch no GPU."""
    forks = sys.platform == "linux"
    context = multiprocessing.get_context("fork" if forks else None)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    if forks:  # at the first task; a Ctrl-C must wait until the workers leave it to the parent
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            pool.submit(int)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pool


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, which still finishes its update, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)  # those of the parent are not there after a fork
    end_with_parent()


def end_with_parent() -> None:
    """Let this worker process end when its parent does, also when that was killed; else it would wait for it forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker process"

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
