"""Storage of a shard set's files: a directory, or a URL that fsspec reads, with retries and optionally a cache."""

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
from weakclip.runtime.errors import UserError

_CHUNK = 8 * 2**20
"""Bytes per request when a whole file is downloaded."""
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0
"""Seconds between two tries."""
_random = random.SystemRandom()  # a separate generator, so that neither seeds nor forks make processes wait in step
_log = logging.getLogger(__name__)


class StorageError(UserError):
    """A URL cannot be read. One line: the URL, what happened, how often it was tried, and a hint."""


class Storage(ABC):
    """Reads the files of one shard set. It can be pickled and used after a fork. `str` gives the directory or the URL."""

    @staticmethod
    def of(root: str | Path, options: DataConfig | None = None) -> Storage:
        """Return the storage of the set at `root`: a directory, or a URL, which is read according to `options`."""
        if "://" not in str(root):
            return LocalStorage(Path(root))
        options = options or DataConfig()
        cache = Cache(Path(options.cache).expanduser(), int(options.cache_gib * 2**30)) if options.cache else None
        return RemoteStorage(str(root).rstrip("/"), options.retries, options.timeout, cache)

    @property
    @abstractmethod
    def checked(self) -> bool:
        """Whether bytes are known to be those of the source: read from a disk, or checked by SHA-256."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return a whole small file."""

    @abstractmethod
    def read_range(self, file: File, offset: int, length: int) -> bytes:
        """Return `length` bytes from byte `offset` of `file`."""

    @abstractmethod
    def prefetch(self, files: Sequence[File]) -> None:
        """Start to prefetch files into the cache, if there is one, and return at once.

        files: those that are read now, then those that follow, in the order of their use. The first ones that fit into the cache
        together are fetched. Another call replaces what is left of the previous one.
        """


@dataclass(frozen=True)
class LocalStorage(Storage):
    """A directory. OSErrors pass through."""

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
    """A URL. Each range is one request; with a cache, whole files are downloaded once and checked. Raises StorageError.

    retries: how often a failed request is repeated. timeout: seconds within which its answer must have arrived.
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
            hint = "free space there, or set data.cache to another directory"
            raise StorageError(f"{self.cache.directory}: cannot store {self.url}/{file.name} ({error}); {hint}") from None

    def prefetch(self, files: Sequence[File]) -> None:
        if self.cache is not None:
            ends = itertools.accumulate(file.bytes for file in files)
            fitting = [file for file, end in zip(files, ends, strict=True) if end <= self.cache.limit]
            _prefetcher(self, os.getpid()).ask(fitting)

    def fetch_ahead(self, file: File) -> None:
        """Fetch `file` into the cache, unless another process is fetching it. For the prefetcher; the cache must be set."""
        assert self.cache is not None
        self.cache.fetch(file, self._download, wait=False)

    def _download(self, file: File, stream: BinaryIO) -> None:
        """Write all of `file` into `stream`. A wrong SHA-256 is tried again, since the network may change bytes; the same wrong
        SHA-256 twice is an error."""
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
        """Return `length` bytes (None: all) from byte `offset` of a file; requests are repeated until the retries are used up."""
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
            except Exception as error:  # each protocol's client has its own errors
                if reason := _hopeless(error):
                    raise StorageError(f"{url}: {reason}") from None
                what = _described(error, self.timeout)
        settings = f"data.retries (now {self.retries}) or data.timeout (now {self.timeout:g} s)"
        raise StorageError(f"{url}: {what}; tried {self.retries + 1} times; check the server, or raise {settings}")

    def _request(self, url: str, offset: int, length: int | None) -> bytes:
        filesystem = _filesystem(url.partition("://")[0], self.timeout, os.getpid())
        end = None if length is None else offset + length
        data = filesystem.cat_file(url, start=offset, end=end, timeout=self.timeout)
        if length is not None and len(data) > length:
            raise StorageError(f"{url}: received {len(data)} bytes instead of {length}; the server must support Range requests")
        if length is not None and len(data) < length:
            raise EOFError(f"received {len(data)} bytes instead of {length}")
        return data


@functools.cache
def _filesystem(protocol: str, timeout: float, process: int) -> Any:
    """fsspec's filesystem of one process (its id): its thread and connections don't survive a fork."""
    import fsspec  # slow with what it imports for a protocol, and only needed to read from URLs

    options: dict[str, Any] = {}
    try:
        kind = fsspec.get_filesystem_class(protocol)
        if protocol in ("http", "https"):
            from aiohttp import ClientTimeout

            # trust_env: use the proxy and the .netrc of the environment.
            options = {"client_kwargs": {"timeout": ClientTimeout(total=timeout), "trust_env": True}}
        elif protocol in ("s3", "s3a"):
            # _get retries; retrying in both places would multiply the attempts.
            limits = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"total_max_attempts": 1}}
            options = {"config_kwargs": limits}
        elif protocol in ("gs", "gcs"):
            # The class that fsspec names first asks by gRPC what kind of bucket it is, which may hang after a fork.
            import gcsfs.core

            kind = gcsfs.core.GCSFileSystem
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it also logs tracebacks of errors that it raises
        filesystem = kind(skip_instance_cache=True, **options)
    except ImportError as error:
        raise StorageError(f"{protocol}:// needs a package that is missing ({error}); pip install 'weakclip[remote]'") from None
    except ValueError:
        raise StorageError(f"{protocol}:// is not supported; use a directory or a URL with http(s)://, s3:// or gs://") from None
    if protocol in ("s3", "s3a"):
        filesystem.retries = 1
    return filesystem


def _hopeless(error: Exception) -> str | None:
    """Return why a retry cannot help; None if it may."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(error, FileNotFoundError) or status == 404:
        return "there is no such file; is the URL right, and was all of the shard set copied there?"
    no_credentials = type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
    if isinstance(error, PermissionError) or status in (401, 403) or no_credentials or str(error).startswith("Forbidden"):
        return f"access is denied ({_one_line(error)}); check that the environment has credentials for it"
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        return f"the server rejects the request ({_one_line(error)}); is the shard there the one that the index describes?"
    if isinstance(error, (ValueError, TypeError)):
        return f"it cannot be requested ({_one_line(error)}); is the URL right?"
    return None


def _described(error: Exception, timeout: float) -> str:
    late = isinstance(error, (TimeoutError, asyncio.TimeoutError))  # two classes before Python 3.11
    return f"no complete answer within {timeout:g} s" if late else _one_line(error)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}".rstrip(": ")


@functools.cache
def _prefetcher(storage: RemoteStorage, process: int) -> _Prefetcher:
    """Return the prefetcher of one storage in one process (its id): threads do not survive a fork."""
    return _Prefetcher(storage)


class _Prefetcher:
    """A thread that fetches files into the cache; each request replaces the previous one."""

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
                    break  # whoever reads the file will get the same error and report it
