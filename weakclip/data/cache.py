"""A directory of limited size for downloaded files, shared by all processes and nodes that see it.

    SHA256.tar            a complete file; its modification time is when it was last used
    SHA256.tar.partial    a file that is being downloaded; it has its final length from the start, so that its space is reserved
    locks/HH              held while a file whose SHA-256 begins with HH is downloaded
    locks/room            held while space is freed

Files are named by content, so files of two sets with the same name do not collide, and a changed file is a different file.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

_PARTIAL = ".partial"
_POLL = 0.05  # seconds between two checks of what other processes hold


@dataclass(frozen=True)
class File:
    """A file of a shard set as its index describes it: name in the set, size in bytes, SHA-256."""

    name: str
    bytes: int
    sha256: str


Download = Callable[[File, BinaryIO], None]
"""Writes the file into the stream and checks it, or raises."""


@dataclass(frozen=True)
class Cache:
    """The cache directory and its size limit in bytes. OSErrors of the directory pass through."""

    directory: Path
    limit: int

    def read(self, file: File, offset: int, length: int, download: Download) -> bytes:
        """Return `length` bytes from byte `offset` of `file`, which is downloaded first if it is not in the cache."""
        while True:
            try:
                with open(self._place(file), "rb", buffering=0) as stream:
                    status = os.fstat(stream.fileno())
                    if status.st_size == file.bytes:
                        if time.time() - status.st_mtime > 1:  # not at every read: metadata may be slow on a network file system
                            os.utime(stream.fileno())
                        stream.seek(offset)
                        return stream.read(length)
                self._place(file).unlink(missing_ok=True)  # something else truncated it
            except OSError as error:
                # Another process may remove it at any time: an open file stays readable, but not over NFS (ESTALE).
                if error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
            self.fetch(file, download)

    def fetch(self, file: File, download: Download, wait: bool = True) -> None:
        """Make sure that `file` is in the cache, and mark it as the most recently used.

        wait: False skips a file that another process is downloading, and one whose space is reserved by other downloads.
        """
        place, partial = self._place(file), self._place(file, _PARTIAL)
        (self.directory / "locks").mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.utime(place)
            return
        with suppress(Timeout), self._lock(file.sha256[:2], wait):
            with suppress(FileNotFoundError):  # another process downloaded it while this one waited for the lock
                os.utime(place)
                return
            try:
                if self._reserve(file, wait):
                    with open(partial, "r+b") as stream:
                        download(file, stream)
                        stream.flush()
                        os.fsync(stream.fileno())  # its length is final already: after a power cut, holes would pass for data
                    with self._lock("room"):  # whoever frees space sees it under one of its names
                        os.replace(partial, place)
            finally:
                partial.unlink(missing_ok=True)

    def _place(self, file: File, suffix: str = "") -> Path:
        return self.directory / f"{file.sha256}.tar{suffix}"

    def _lock(self, name: str, wait: bool = True) -> FileLock:
        return FileLock(self.directory / "locks" / name, timeout=-1 if wait else 0, poll_interval=_POLL)

    def _reserve(self, file: File, wait: bool) -> bool:
        """Create the partial file of `file` at its final length once it fits; return whether it did. Its lock must be held."""
        while True:
            with self._lock("room"):
                if self._make_room(file):
                    with open(self._place(file, _PARTIAL), "wb") as stream:
                        stream.truncate(file.bytes)
                    return True
            if not wait:
                return False
            time.sleep(_POLL)

    def _make_room(self, file: File) -> bool:
        """Remove the least recently used files until `file` fits; return False if other downloads reserve too much space.

        When nothing else is being downloaded, `file` always fits, even if it alone is larger than the limit.
        """
        whole, in_flight = [], 0
        for path in self.directory.glob(f"{'[0-9a-f]' * 64}.tar*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                if path.suffix == ".tar":
                    whole.append((status.st_mtime, status.st_size, path))
                elif not self._remove_leftover(path, file):
                    in_flight += status.st_size
        if in_flight and in_flight + file.bytes > self.limit:
            return False
        excess = in_flight + sum(size for _, size, _ in whole) + file.bytes - self.limit
        for _, size, path in sorted(whole):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size
        return True

    def _remove_leftover(self, partial: Path, file: File) -> bool:
        """Remove a partial file that a killed process left, and return whether it did: nobody holds its lock, or this process
        does, for `file`."""
        name = partial.name[:2]
        try:
            if name == file.sha256[:2]:
                partial.unlink(missing_ok=True)
            else:
                with self._lock(name, wait=False):
                    partial.unlink(missing_ok=True)
        except Timeout:
            return False
        return True
