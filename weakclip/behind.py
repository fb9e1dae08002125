"""Processes that finish what this one begins."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from weakclip.interrupt import SIGNALS, held_back
from weakclip.processes import die_with_parent

A = TypeVar("A")
R = TypeVar("R")


class Behind:
    """So many processes, one a core (None), or none: then all is done in this one.

    They begin when they are first needed, and leave to this one the signals that all processes of a job get; they end with it.
    """

    def __init__(self, processes: int | None) -> None:
        processes = len(os.sched_getaffinity(0)) if processes is None else processes
        # Spawned, not forked: a fork would copy the locks of torch's threads, and cannot use a GPU that this process uses.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(processes, context, _leave_signals_to_the_parent) if processes else None
        self._most = 2 * processes

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[A], R], arguments: Iterable[A]) -> Iterator[R]:
        """`map(function, arguments)`, results in order, arguments made here meanwhile; at most two a process are on their way.

        Raises ValueError when a process dies; what `function` raises passes through.
        """
        if self._pool is None:
            yield from map(function, arguments)
            return
        running: deque[Future[R]] = deque()
        try:
            for argument in arguments:
                with held_back(), _large_pages():  # this may begin a process
                    running.append(self._pool.submit(function, argument))
                while running and (running[0].done() or len(running) > self._most):
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool:
            raise ValueError("a process ended abruptly, perhaps for want of memory; use fewer (pseudo.processes)") from None


@contextmanager
def _large_pages() -> Iterator[None]:
    """Processes that begin meanwhile ask Linux for large pages, where glibc can: the CRF's hash tables are of many megabytes, and
    it takes a sixth less time."""
    name, earlier = "GLIBC_TUNABLES", os.environ.get("GLIBC_TUNABLES")
    os.environ[name] = ":".join(filter(None, (earlier, "glibc.malloc.hugetlb=1")))
    try:
        yield
    finally:
        if earlier is None:
            del os.environ[name]
        else:
            os.environ[name] = earlier


def _leave_signals_to_the_parent() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, signal.SIGINT))
    die_with_parent()
