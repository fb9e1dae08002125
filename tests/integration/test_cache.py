"""Processes that share the cache's directory."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import BinaryIO

import pytest

from tests.integration.preloaded import FORKS
from tests.unit.data.test_cache import FILES, SIZE, content, here, here_partly
from weakclip.data.cache import Cache, File


def slow_source(log: Path, seconds: float, file: File, stream: BinaryIO) -> None:
    """Downloads in two halves and leaves a line in `log`."""
    number = FILES.index(file)
    with open(log, "a") as lines:
        lines.write(f"{number}\n")
    stream.write(content(number)[: SIZE // 2])
    stream.flush()
    time.sleep(seconds)
    stream.write(content(number)[SIZE // 2 :])


def read_all(cache: Cache, log: Path, order: list[int], seconds: float) -> None:
    for number in order:
        assert cache.read(FILES[number], 1, SIZE, partial(slow_source, log, seconds)) == content(number)[1:]


def started(function: Callable[..., None], *arguments: object) -> BaseProcess:
    process = FORKS.Process(target=function, args=arguments)
    process.start()
    return process


def ended_well(processes: list[BaseProcess]) -> bool:
    for process in processes:
        process.join()
    return all(process.exitcode == 0 for process in processes)


def test_processes_that_want_one_file_download_it_once(tmp_path):
    cache = Cache(tmp_path / "cache", 3 * SIZE)
    processes = [started(read_all, cache, tmp_path / "log", [0, 1, 2], 0.3) for _ in range(3)]
    assert ended_well(processes)
    assert (tmp_path / "log").read_text().split() == ["0", "1", "2"] and here(cache) == [0, 1, 2]


@pytest.mark.parametrize("limit", [2.5, 1, 0.5])
def test_the_limit_holds_to_within_one_file_with_four_processes(tmp_path, limit):
    cache = Cache(tmp_path / "cache", int(limit * SIZE))
    orders = [[*range(6)] * 2, [*range(5, -1, -1)] * 2, [3, 0, 4, 1, 5, 2] * 2, [2, 5, 1, 4, 0, 3] * 2]
    processes = [started(read_all, cache, tmp_path / "log", order, 0.01) for order in orders]
    largest = 0
    while any(process.is_alive() for process in processes):
        largest = max(largest, taken(cache.directory))
        time.sleep(0.001)
    assert ended_well(processes)
    assert largest <= max(cache.limit, SIZE)


def taken(directory: Path) -> int:
    """Bytes of the files in a directory that others change; its listing may show a file that left, so smaller is possible."""
    sizes = []
    for path in directory.glob("*.tar*"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            return 0
    return sum(sizes)


@pytest.mark.parametrize("next_one", [0, 1])
def test_what_a_killed_process_left_is_removed_and_holds_no_room(tmp_path, next_one):
    cache = Cache(tmp_path / "cache", SIZE)
    process = started(read_all, cache, tmp_path / "log", [0], 60)
    while not (tmp_path / "log").exists():
        assert process.is_alive()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert here_partly(cache) == [0]
    assert cache.read(FILES[next_one], 0, SIZE, partial(slow_source, tmp_path / "log", 0)) == content(next_one)
    assert here(cache) == [next_one]
