"""`map` over processes that end with the one that began them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

R = TypeVar("R")


def map_in_processes(function: Callable[..., R], processes: int, *arguments: Sequence[Any]) -> Iterator[R]:
    """`map(function, *arguments)` over up to `processes` processes, results in order; one means this process.

    Raises ValueError when a process dies; what `function` raises passes through.
    """
    processes = min(processes, len(arguments[0]))
    if processes <= 1:
        yield from map(function, *arguments)
        return
    # Spawned, not forked: a fork would copy the locks of whatever threads (torch's, say) the caller has.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(processes, context, die_with_parent) as pool:
            yield from pool.map(function, *arguments)
    except BrokenProcessPool:
        raise ValueError("a process ended abruptly, perhaps for want of memory; use fewer processes") from None


def die_with_parent() -> None:
    """Without this a killed command's processes would stay, and write into the directory of the next."""

    def watch() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
