"""Worker processes that end with their parent, and threads with one core each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import TypeVar

from weakclip.runtime.errors import UserError
from weakclip.runtime.signals import SIGNALS, held_back

A = TypeVar("A")
R = TypeVar("R")


ON_A_GPU = 3
"""Images in progress on a GPU."""
_starting = threading.Lock()


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


class WorkerPool:
    """A pool of worker processes. processes: their number; None: one per core; 0: none, all work is done in this process.

    Workers start when they are first needed, ignore the signals that all processes of a job receive, and end with this process.
    Their functions must not be defined in the main module, which they do not import.
    """

    def __init__(self, processes: int | None) -> None:
        self.processes = processes = cores() if processes is None else processes
        with held_back():  # this starts a process that keeps track of semaphores
            self._pool = _spawned(processes, _leave_signals_to_the_parent) if processes else None
        self._most = 2 * processes

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[A], R], arguments: Iterable[A]) -> Iterator[R]:
        """Yield `function(argument)` for each argument, in order; this process produces the arguments meanwhile.

        At most two arguments per worker are in flight. Raises UserError when a worker dies; errors of `function` pass through.
        """
        if self._pool is None:
            yield from map(function, arguments)
            return
        with _broken():
            yield from _in_order(partial(self._submit, self._pool, function), arguments, self._most)

    def run(self, function: Callable[[A], R], argument: A) -> R:
        """Return `function(argument)`. The calling thread waits, so it and the worker together use one core. Raises as `map`."""
        if self._pool is None:
            return function(argument)
        with _broken():
            return self._submit(self._pool, function, argument).result()

    def _submit(self, pool: ProcessPoolExecutor, function: Callable[[A], R], argument: A) -> Future[R]:
        if len(pool._processes or ()) == self.processes:
            return pool.submit(function, argument)
        with _starting, held_back(), _large_pages(), _without_main():  # this may start a process
            return pool.submit(function, argument)


def map_in_processes(function: Callable[[A], R], processes: int, arguments: Sequence[A]) -> Iterator[R]:
    """Yield `function(argument)` for each argument, in order, computed by `processes` workers; with one, by this process.

    Unlike those of a WorkerPool, these workers stop at once on Ctrl-C. Raises UserError when a worker dies; errors of `function`
    pass through.
    """
    processes = min(processes, len(arguments))
    if processes <= 1:
        yield from map(function, arguments)
        return
    with _broken(), _spawned(processes, die_with_parent) as pool:
        yield from _in_order(lambda argument: pool.submit(function, argument), arguments, 2 * processes)


def _spawned(processes: int, initializer: Callable[[], None]) -> ProcessPoolExecutor:
    """Return a pool of spawned processes: a fork copies the locks of torch's threads, and cannot use a GPU already in use."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer)


@contextmanager
def _broken() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps because the machine ran out of memory; "
            "use fewer workers (--processes, pseudo.processes; a training with boundary.engine=exact needs none)"
        ) from None


def map_images(function: Callable[[A], R], processes: int, images: Iterable[A]) -> Iterator[R]:
    """Yield `function(image)` for each image, in order, with several in progress where that uses the device better.

    On a GPU they are ON_A_GPU: the next ones are prepared and queued while one is computed. On a CPU there is one for each of
    two or more `processes`, each on one core; otherwise one at a time uses all cores.
    """
    import torch  # see map_in_threads

    threads = ON_A_GPU if torch.cuda.is_available() else processes
    return map_in_threads(function, threads, images) if threads > 1 else map(function, images)


def map_in_threads(function: Callable[[A], R], threads: int, arguments: Iterable[A]) -> Iterator[R]:
    """Yield `function(argument)` for each argument, in order, computed by `threads` threads; at most two per thread in flight.

    Each thread uses one core for torch: computing several results in parallel uses the cores better than computing one after the
    other on all cores, and results do not depend on the number of cores.
    """
    import torch  # takes seconds to import, and a login node that only writes or counts shards does not need it

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # for threads that start from now on, too
    pool = ThreadPoolExecutor(threads)
    try:
        yield from _in_order(lambda argument: pool.submit(function, argument), arguments, 2 * threads)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _in_order(submit: Callable[[A], Future[R]], arguments: Iterable[A], most: int) -> Iterator[R]:
    """Yield the results of `submit(argument)` in order, with at most `most` in flight."""
    running: deque[Future[R]] = deque()
    for argument in arguments:
        running.append(submit(argument))
        while running and (running[0].done() or len(running) > most):
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


@contextmanager
def _large_pages() -> Iterator[None]:
    """Let processes that start in this context ask Linux for large pages, where glibc supports it. The CRF's hash tables take
    many megabytes, and with large pages it runs in a sixth less time."""
    name, earlier = "GLIBC_TUNABLES", os.environ.get("GLIBC_TUNABLES")
    os.environ[name] = ":".join(filter(None, (earlier, "glibc.malloc.hugetlb=1")))
    try:
        yield
    finally:
        if earlier is None:
            del os.environ[name]
        else:
            os.environ[name] = earlier


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep processes that start in this context from importing the main module, which takes seconds for a stage."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _leave_signals_to_the_parent() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, signal.SIGINT))
    die_with_parent()


def die_with_parent() -> None:
    """End this worker when its parent ends: a worker that lived on would write into the directory of the next command."""

    def watch() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
