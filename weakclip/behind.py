"""`map` whose arguments are made here while other processes work on earlier ones."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from weakclip.interrupt import SIGNALS, held_back
from weakclip.processes import die_with_parent

A = TypeVar("A")
R = TypeVar("R")


def map_behind(function: Callable[[A], R], processes: int, arguments: Iterable[A]) -> Iterator[R]:
    """`map(function, arguments)` over `processes` processes, results in order; 0 means this process.

    At most two arguments a process are on their way. Raises ValueError when a process dies; what `function` raises passes
    through. Signals of a job to all its processes are for this one; the others end when it does.
    """
    if not processes:
        yield from map(function, arguments)
        return
    # Spawned, not forked: a fork would copy the locks of torch's threads, and cannot use a GPU that this process uses.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _leave_signals_to_the_parent)
    running: deque[Future[R]] = deque()
    try:
        for argument in arguments:
            with held_back():  # this may begin a process
                running.append(pool.submit(function, argument))
            while running and (running[0].done() or len(running) > 2 * processes):
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool:
        raise ValueError("a process ended abruptly, perhaps for want of memory; use fewer (pseudo.processes)") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_signals_to_the_parent() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, signal.SIGINT))
    die_with_parent()
