"""The cache directory: which files are kept and evicted, and safe use by several processes."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pytest

from weakclip.data.cache import Cache, File

SIZE = 1000


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


def file(number: int, name: str = "shard-00000.tar") -> File:
    return File(name, SIZE, hashlib.sha256(content(number)).hexdigest())


FILES = [file(number) for number in range(6)]


class Source:
    """Where files come from; it keeps in mind which were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, file: File, stream: BinaryIO) -> None:
        number = FILES.index(file)
        self.asked.append(number)
        stream.write(content(number))


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def cache(tmp_path) -> Cache:
    """Room for three files."""
    return Cache(tmp_path / "cache", 3 * SIZE)


def here(cache: Cache) -> list[int]:
    """The files in the cache; there must be nothing else, and all of each."""
    names = {path.name for path in cache.directory.iterdir()} - {"locks"}
    numbers = [number for number, file in enumerate(FILES) if f"{file.sha256}.tar" in names]
    assert len(numbers) == len(names)
    assert all((cache.directory / f"{FILES[number].sha256}.tar").read_bytes() == content(number) for number in numbers)
    return numbers


def used(cache: Cache, number: int, seconds_ago: float) -> None:
    path = cache.directory / f"{FILES[number].sha256}.tar"
    os.utime(path, (time.time() - seconds_ago,) * 2)


def test_a_file_is_downloaded_once_and_read_in_parts(cache, source):
    assert cache.read(FILES[1], 10, 5, source) == content(1)[10:15]
    assert cache.read(FILES[1], 990, 100, source) == content(1)[990:]
    assert source.asked == [1] and here(cache) == [1]


def test_what_was_used_longest_ago_leaves_first(cache, source):
    for number, seconds in ((0, 30), (1, 20), (2, 10)):
        cache.fetch(FILES[number], source)
        used(cache, number, seconds)
    cache.read(FILES[0], 0, 1, source)  # now 1 is the oldest
    cache.fetch(FILES[3], source)
    assert here(cache) == [0, 2, 3]
    cache.fetch(FILES[2], source)  # now 0 is the oldest
    used(cache, 3, -1)
    cache.fetch(FILES[4], source)
    assert here(cache) == [2, 3, 4] and source.asked == [0, 1, 2, 3, 4]


def test_equal_names_do_not_meet_and_a_changed_file_is_another(cache, source):
    assert len({file.name for file in FILES}) == 1
    assert [cache.read(FILES[number], 0, 1, source)[0] for number in (0, 1, 0, 1)] == [0, 1, 0, 1]


def test_a_file_larger_than_the_limit_is_there_alone(tmp_path, source):
    cache = Cache(tmp_path / "cache", SIZE // 2)
    for number in (0, 1):
        assert cache.read(FILES[number], 0, 1, source) == content(number)[:1]
        assert here(cache) == [number]


def test_an_open_file_stays_readable_when_it_leaves(cache, source):
    cache.fetch(FILES[0], source)
    with open(cache.directory / f"{FILES[0].sha256}.tar", "rb") as stream:
        for number in (1, 2, 3):
            cache.fetch(FILES[number], source)
        assert here(cache) == [1, 2, 3] and stream.read() == content(0)


@pytest.mark.parametrize("harm", [Path.unlink, partial(os.truncate, length=10)])
def test_what_someone_removed_or_cut_is_downloaded_again(cache, source, harm):
    cache.fetch(FILES[0], source)
    harm(cache.directory / f"{FILES[0].sha256}.tar")
    assert cache.read(FILES[0], 0, SIZE, source) == content(0) and source.asked == [0, 0]


def test_a_failed_download_leaves_nothing(cache, source):
    def fail(file: File, stream: BinaryIO) -> None:
        stream.write(b"half")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        cache.read(FILES[0], 0, 1, fail)
    assert here(cache) == []
    assert cache.read(FILES[0], 0, SIZE, source) == content(0)


def test_other_files_in_the_directory_are_left_alone(cache, source):
    cache.directory.mkdir()
    (cache.directory / "thesis.tar").write_bytes(bytes(10 * SIZE))
    for number in range(4):
        cache.fetch(FILES[number], source)
    assert (cache.directory / "thesis.tar").stat().st_size == 10 * SIZE
    assert len(list(cache.directory.glob("*.tar"))) == 4


def test_what_another_is_fetching_is_waited_for_or_left_out(cache, source):
    inside, go_on = threading.Event(), threading.Event()

    def slow(file: File, stream: BinaryIO) -> None:
        inside.set()
        assert go_on.wait(20)
        source(file, stream)

    thread = threading.Thread(target=cache.fetch, args=(FILES[0], slow))
    thread.start()
    assert inside.wait(20)
    cache.fetch(FILES[0], source, wait=False)
    small = Cache(cache.directory, SIZE)
    small.fetch(FILES[1], source, wait=False)  # there is room for one
    assert source.asked == [] and here_partly(cache) == [0]
    waiting = threading.Thread(target=small.fetch, args=(FILES[1], source))
    waiting.start()
    go_on.set()
    thread.join()
    waiting.join()
    assert here(cache) == [1] and source.asked == [0, 1]


def here_partly(cache: Cache) -> list[int]:
    return [number for number, file in enumerate(FILES) if (cache.directory / f"{file.sha256}.tar.partial").exists()]
