"""Threads that share what this process does, and processes that finish what it begins."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

from weakclip.interrupt import SIGNALS, held_back
from weakclip.processes import die_with_parent

A = TypeVar("A")
R = TypeVar("R")


class Behind:
    """So many processes, one a core (None), or none: then all is done in this one.

    They begin when they are first needed, and leave to this one the signals that all processes of a job get; they end with it.
    """

    def __init__(self, processes: int | None) -> None:
        self.processes = processes = len(os.sched_getaffinity(0)) if processes is None else processes
        # Spawned, not forked: a fork would copy the locks of torch's threads, and cannot use a GPU that this process uses.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(processes, context, _leave_signals_to_the_parent) if processes else None
        self._most = 2 * processes
        self._submitting = threading.Lock()

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
        with _broken():
            yield from _in_order(partial(self._submit, self._pool, function), arguments, self._most)

    def run(self, function: Callable[[A], R], argument: A) -> R:
        """`function(argument)`. The thread that calls waits for it, so that it and the process load one core. Raises as `map`."""
        if self._pool is None:
            return function(argument)
        with _broken():
            return self._submit(self._pool, function, argument).result()

    def _submit(self, pool: ProcessPoolExecutor, function: Callable[[A], R], argument: A) -> Future[R]:
        with self._submitting, held_back(), _large_pages():  # this may begin a process
            return pool.submit(function, argument)


@contextmanager
def _broken() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise ValueError("a process ended abruptly, perhaps for want of memory; use fewer (pseudo.processes)") from None


def map_in_threads(function: Callable[[A], R], threads: int, arguments: Iterable[A]) -> Iterator[R]:
    """`map(function, arguments)` by so many threads, results in order; at most two a thread are on their way.

    Each has one core for torch: several results side by side make more of the cores than one after the other on all of them, and
    do not depend on their number.
    """
    cores = torch.get_num_threads()
    torch.set_num_threads(1)  # of threads that begin from now on, too
    pool = ThreadPoolExecutor(threads)
    try:
        yield from _in_order(lambda argument: pool.submit(function, argument), arguments, 2 * threads)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)


def _in_order(submit: Callable[[A], Future[R]], arguments: Iterable[A], most: int) -> Iterator[R]:
    """Results of what is submitted, of which at most so many are on their way."""
    running: deque[Future[R]] = deque()
    for argument in arguments:
        running.append(submit(argument))
        while running and (running[0].done() or len(running) > most):
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


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
