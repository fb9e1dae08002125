"""Where the files of a shard set lie: in a directory, or at a URL that fsspec reads, with retries and perhaps a cache."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import logging
import os
import queue
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from weakclip.config import DataConfig
from weakclip.data.cache import Cache, File

_CHUNK = 8 * 2**20
"""Bytes a request where a whole file is fetched."""
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
"""Seconds between two tries."""
_random = random.SystemRandom()  # a generator of its own, so that neither seeds nor forks make processes wait in step
_log = logging.getLogger(__name__)


class StorageError(ValueError):
    """What lies at a URL cannot be had. One line: the URL, what happened, how often it was tried, the cure."""


class Storage(ABC):
    """Reads the files of one shard set; pickles, and may be used after a fork. `str` gives the directory or the URL."""

    @staticmethod
    def of(root: str | Path, options: DataConfig | None = None) -> Storage:
        """The storage of the set at `root`: a directory, or a URL, which is read as `options` say."""
        if "://" not in str(root):
            return LocalStorage(Path(root))
        options = options or DataConfig()
        cache = Cache(Path(options.cache).expanduser(), int(options.cache_gib * 2**30)) if options.cache else None
        return RemoteStorage(str(root).rstrip("/"), options.retries, options.timeout, cache)

    @property
    @abstractmethod
    def checked(self) -> bool:
        """Whether bytes are known to be the source's: read from a disk, or compared with a SHA-256."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole small file."""

    @abstractmethod
    def read_range(self, file: File, offset: int, length: int) -> bytes:
        """`length` bytes from byte `offset` of `file`."""

    @abstractmethod
    def prefetch(self, files: Sequence[File]) -> None:
        """Start to fetch files into the cache, where there is one; returns at once.

        files: those that are read now, then those that come next, in the order of their use; so many as the cache holds
        together are fetched. Another call replaces what is left of the one before.
        """


@dataclass(frozen=True)
class LocalStorage(Storage):
    """A directory. What the system says is wrong (OSError) passes through."""

    root: Path

    def __str__(self) -> str:
        return str(self.root)

    @property
    def checked(self) -> bool:
        return True

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def read_range(self, file: File, offset: int, length: int) -> bytes:
        with open(self.root / file.name, "rb", buffering=0) as stream:
            stream.seek(offset)
            return stream.read(length)

    def prefetch(self, files: Sequence[File]) -> None:
        pass


@dataclass(frozen=True)
class RemoteStorage(Storage):
    """A URL. Each range is a request; with a cache, whole files are fetched once and checked. Raises StorageError.

    retries: how often a request is repeated. timeout: seconds in which its answer must have arrived.
    """

    url: str
    retries: int
    timeout: float
    cache: Cache | None

    def __str__(self) -> str:
        return self.url

    @property
    def checked(self) -> bool:
        return self.cache is not None

    def read(self, name: str) -> bytes:
        return self._get(name, 0, None)

    def read_range(self, file: File, offset: int, length: int) -> bytes:
        if self.cache is None:
            return self._get(file.name, offset, length)
        try:
            return self.cache.read(file, offset, length, self._download)
        except OSError as error:
            cure = "make room there, or set data.cache to another directory"
            raise StorageError(f"{self.cache.directory}: cannot hold {self.url}/{file.name} ({error}); {cure}") from None

    def prefetch(self, files: Sequence[File]) -> None:
        if self.cache is not None:
            ends = itertools.accumulate(file.bytes for file in files)
            fitting = [file for file, end in zip(files, ends, strict=True) if end <= self.cache.limit]
            _prefetcher(self, os.getpid()).ask(fitting)

    def fetch_ahead(self, file: File) -> None:
        """Have `file` in the cache, unless another process is at it. For the prefetcher; the cache must be set."""
        assert self.cache is not None
        self.cache.fetch(file, self._download, wait=False)

    def _download(self, file: File, stream: BinaryIO) -> None:
        """Write all of `file`, whose SHA-256 must be the index's; the network may change bytes, so once more if it isn't."""
        digests: list[str] = []
        while len(digests) <= self.retries and len(set(digests)) == len(digests):
            stream.seek(0)
            digest = hashlib.sha256()
            for offset in range(0, file.bytes, _CHUNK):
                data = self._get(file.name, offset, min(_CHUNK, file.bytes - offset))
                digest.update(data)
                stream.write(data)
            digests.append(digest.hexdigest())
            if digests[-1] == file.sha256:
                return
        what = f"SHA-256 is {digests[-1]}, the index has {file.sha256}, after {len(digests)} downloads"
        raise StorageError(f"{self.url}/{file.name}: {what}; copy the shard set there again")

    def _get(self, name: str, offset: int, length: int | None) -> bytes:
        """`length` bytes (None: all) from byte `offset` of a file, asked for until they come or the retries are used up."""
        url = f"{self.url}/{name}"
        what = ""
        for tried in range(self.retries + 1):
            if tried:
                wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (tried - 1)) * _random.uniform(0.5, 1)
                _log.warning("%s: %s; retry %d of %d in %.1f s", url, what, tried, self.retries, wait)
                time.sleep(wait)
            try:
                return self._request(url, offset, length)
            except StorageError:
                raise
            except Exception as error:  # each protocol's client has errors of its own
                if reason := _hopeless(error):
                    raise StorageError(f"{url}: {reason}") from None
                what = _described(error, self.timeout)
        settings = f"data.retries (now {self.retries}) or data.timeout (now {self.timeout:g} s)"
        raise StorageError(f"{url}: {what}; tried {self.retries + 1} times; look after the server, or raise {settings}")

    def _request(self, url: str, offset: int, length: int | None) -> bytes:
        filesystem = _filesystem(url.partition("://")[0], self.timeout, os.getpid())
        end = None if length is None else offset + length
        data = filesystem.cat_file(url, start=offset, end=end, timeout=self.timeout)
        if length is not None and len(data) > length:
            raise StorageError(f"{url}: {len(data)} bytes came where {length} were asked for; the server must know Range")
        if length is not None and len(data) < length:
            raise EOFError(f"{len(data)} bytes came where {length} were asked for")
        return data


@functools.cache
def _filesystem(protocol: str, timeout: float, process: int) -> Any:
    """fsspec's filesystem of one process (its id): its thread and connections don't survive a fork."""
    import fsspec  # with what it imports for a protocol: only those who read from URLs need to wait for it

    options: dict[str, Any] = {}
    try:
        kind = fsspec.get_filesystem_class(protocol)
        if protocol in ("http", "https"):
            from aiohttp import ClientTimeout

            # trust_env: the proxy and the .netrc of the environment.
            options = {"client_kwargs": {"timeout": ClientTimeout(total=timeout), "trust_env": True}}
        elif protocol in ("s3", "s3a"):
            # Retrying is done here, not twice.
            limits = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"total_max_attempts": 1}}
            options = {"config_kwargs": limits}
        elif protocol in ("gs", "gcs"):
            # The class that fsspec names asks first what kind of bucket it is, by gRPC, which may hang after a fork.
            import gcsfs.core

            kind = gcsfs.core.GCSFileSystem
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of errors that it raises as well
        filesystem = kind(skip_instance_cache=True, **options)
    except ImportError as error:
        raise StorageError(f"{protocol}:// needs a package that is missing ({error}); pip install 'weakclip[remote]'") from None
    except ValueError:
        raise StorageError(f"{protocol}:// is unknown; shards lie in a directory or at http(s)://, s3:// or gs://") from None
    if protocol in ("s3", "s3a"):
        filesystem.retries = 1
    return filesystem


def _hopeless(error: Exception) -> str | None:
    """Why asking again cannot help; None where it may."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(error, FileNotFoundError) or status == 404:
        return "there is no such file; is the URL right, and was all of the shard set copied there?"
    no_credentials = type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
    if isinstance(error, PermissionError) or status in (401, 403) or no_credentials or str(error).startswith("Forbidden"):
        return f"access is refused ({_one_line(error)}); see that the environment has credentials for it"
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        return f"the server refuses ({_one_line(error)}); is the shard there the one that the index describes?"
    if isinstance(error, (ValueError, TypeError)):
        return f"it cannot be asked for ({_one_line(error)}); is the URL right?"
    return None


def _described(error: Exception, timeout: float) -> str:
    late = isinstance(error, (TimeoutError, asyncio.TimeoutError))  # two classes before Python 3.11
    return f"no whole answer within {timeout:g} s" if late else _one_line(error)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}".rstrip(": ")


@functools.cache
def _prefetcher(storage: RemoteStorage, process: int) -> _Prefetcher:
    """That of one storage in one process (its id): threads don't survive a fork."""
    return _Prefetcher(storage)


class _Prefetcher:
    """A thread that fetches files into the cache; what is asked for replaces what was asked for before."""

    def __init__(self, storage: RemoteStorage) -> None:
        self._storage = storage
        self._asked: queue.SimpleQueue[Sequence[File]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="prefetch", daemon=True).start()

    def ask(self, files: Sequence[File]) -> None:
        self._asked.put(files)

    def _run(self) -> None:
        while True:
            for file in self._asked.get():
                if not self._asked.empty():
                    break
                try:
                    self._storage.fetch_ahead(file)
                except (StorageError, OSError):
                    break  # whoever reads the file will meet it too, and report it
