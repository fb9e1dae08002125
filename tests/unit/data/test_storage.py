"""Shard sets at URLs: which requests are made, how often, and the errors. Real servers are in test_remote.py."""

from __future__ import annotations

import pickle
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import fsspec
import pytest

from weakclip import recipe
from weakclip.config import ConfigError, DataConfig
from weakclip.data import storage as storages
from weakclip.data.index import Index, ShardError
from weakclip.data.reading import load, read_entry
from weakclip.data.storage import LocalStorage, RemoteStorage, Storage, StorageError

URL = "memory://bucket/set"


@pytest.fixture(scope="module")
def local(tmp_path_factory, make_shards) -> Index:
    """Seven samples in shards of 3, 3 and 1."""
    return make_shards(tmp_path_factory.mktemp("storage") / "set")


class Filesystem:
    """fsspec's memory filesystem with the set in it; `answers` replace what the next requests get: bytes, or an error."""

    def __init__(self, root: Path) -> None:
        self.memory = fsspec.filesystem("memory", skip_instance_cache=True)
        self.memory.store = {}
        for file in root.iterdir():
            self.memory.pipe(f"{URL}/{file.name}", file.read_bytes())
        self.answers: list = []
        self.asked: list[tuple] = []

    def cat_file(self, url: str, start: int, end: int | None, timeout: float) -> bytes:
        self.asked.append((url.rpartition("/")[2], start, end))
        answer = self.answers.pop(0) if self.answers else self.memory.cat_file(url, start=start, end=end)
        if isinstance(answer, BaseException):
            raise answer
        return answer


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The waits between tries, which take no time."""
    waits: list[float] = []
    monkeypatch.setattr(storages.time, "sleep", waits.append)
    return waits


@pytest.fixture
def remote(local, monkeypatch, waits) -> Filesystem:
    filesystem = Filesystem(local.root)
    monkeypatch.setattr(storages, "_filesystem", lambda protocol, timeout, process: filesystem)
    return filesystem


def options(cache: Path | None = None, **changes) -> DataConfig:
    return DataConfig(cache=str(cache) if cache else None, **changes)


class Status(Exception):
    """An HTTP client's error."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status}, so sorry")
        self.status = status


# ------------------------------------------------------------------------------------------------------------ what it is


def test_a_path_is_a_directory_and_a_URL_is_read_as_the_options_say(tmp_path):
    assert Storage.of(tmp_path) == Storage.of(str(tmp_path)) == LocalStorage(tmp_path)
    storage = Storage.of("s3://bucket/set/", options(retries=3, timeout=2.0))
    assert storage == RemoteStorage("s3://bucket/set", 3, 2.0, None) and str(storage) == "s3://bucket/set"
    cached = Storage.of("https://host/set", options(tmp_path / "cache", cache_gib=0.5))
    assert isinstance(cached, RemoteStorage) and cached.cache
    assert (cached.cache.directory, cached.cache.limit) == (tmp_path / "cache", 2**29)
    assert (LocalStorage(tmp_path).checked, storage.checked, cached.checked) == (True, False, True)


def test_a_home_directory_may_hold_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    storage = Storage.of(URL, DataConfig(cache="~/shards"))
    assert isinstance(storage, RemoteStorage) and storage.cache and storage.cache.directory == tmp_path / "shards"


def test_a_set_reads_the_same_from_a_URL_as_from_a_directory(local, remote, tmp_path):
    for cache in (None, tmp_path / "cache"):
        index = Index.load(URL, options(cache))
        assert (index.classes, index.shards) == (local.classes, local.shards)
        assert [read_entry(index, entry) for entry in index.entries] == [read_entry(local, entry) for entry in local.entries]


@pytest.mark.parametrize("address", [URL, URL + "/", URL + "/index.json"])
def test_a_set_is_named_by_its_directory_or_its_index(local, remote, address):
    assert str(Index.load(address).storage) == URL


@pytest.mark.parametrize("cache", [False, True])
def test_an_index_pickles_with_its_storage(local, remote, tmp_path, cache):
    index = Index.load(URL, options(tmp_path / "cache" if cache else None))
    read_entry(index, index.entries[0])
    again = pickle.loads(pickle.dumps(index))
    assert again == index and read_entry(again, again.entries[4]) == read_entry(local, local.entries[4])


def test_what_needs_a_directory_says_so(local, remote):
    with pytest.raises(ShardError, match=r"memory://bucket/set: this needs a shard set on a local disk; copy it there"):
        _ = Index.load(URL).root


# -------------------------------------------------------------------------------------------------------- how it is read


def test_without_a_cache_every_sample_is_one_request_for_its_bytes(remote):
    index = Index.load(URL)
    for entry in index.entries:
        read_entry(index, entry)
    assert remote.asked == [("index.json", 0, None), *((e.shard, e.offset, e.offset + e.length) for e in index.entries)]


def test_with_a_cache_every_shard_is_fetched_once_in_pieces(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(storages, "_CHUNK", 10_000)
    index = Index.load(URL, options(tmp_path / "cache"))
    for entry in (*index.entries, *index.entries):
        read_entry(index, entry)
    starts = {shard.name: range(0, shard.bytes, 10_000) for shard in index.shards}
    ends = {shard.name: shard.bytes for shard in index.shards}
    want = [(name, start, min(start + 10_000, ends[name])) for name in starts for start in starts[name]]
    assert remote.asked[1:] == want and any(len(starts[name]) > 1 for name in starts)


def test_prefetched_shards_are_there_before_they_are_read(local, remote, tmp_path):
    index = Index.load(URL, options(tmp_path / "cache"))
    index.storage.prefetch(index.shards)
    await_files(tmp_path / "cache", 3)
    remote.asked.clear()
    assert [read_entry(index, entry) for entry in index.entries] == [read_entry(local, entry) for entry in local.entries]
    assert not remote.asked


def test_no_more_is_prefetched_than_the_cache_holds_together(local, remote, tmp_path):
    gib = sum(shard.bytes for shard in local.shards[:2]) / 2**30
    index = Index.load(URL, options(tmp_path / "cache", cache_gib=gib, shuffle_window=1))
    read_entry(index, index.entries[0])
    index.storage.prefetch(index.shards)
    await_files(tmp_path / "cache", 2)
    index.storage.prefetch(index.shards[:2])  # starts after the previous one ended
    assert {file.stem for file in (tmp_path / "cache").glob("*.tar")} == {shard.sha256 for shard in index.shards[:2]}


def test_a_prefetch_that_fails_leaves_the_error_to_the_reader(remote, tmp_path):
    index = Index.load(URL, options(tmp_path / "cache", retries=0))
    remote.answers = [Status(500)] * 2
    index.storage.prefetch(index.shards)
    deadline = time.monotonic() + 20
    while len(remote.asked) < 2:  # the index, and the first shard; no other one is tried
        assert time.monotonic() < deadline
    with pytest.raises(StorageError, match="Status: 500"):
        read_entry(index, index.entries[0])


def test_prefetching_does_nothing_without_a_cache(local, remote):
    local.storage.prefetch(local.shards)
    index = Index.load(URL)
    index.storage.prefetch(index.shards)
    assert len(remote.asked) == 1


def await_files(directory: Path, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(list(directory.glob("*.tar"))) < count:
        assert time.monotonic() < deadline


# ----------------------------------------------------------------------------------------------------- what can go wrong


@pytest.mark.parametrize(
    "fault, said",
    [
        (Status(503), "Status: 503, so sorry"),
        (Status(429), "Status: 429, so sorry"),
        (ConnectionResetError("gone\nfor good"), "ConnectionResetError: gone for good"),
        (TimeoutError(), r"no complete answer within 7 s"),
        (b"short", r"EOFError: received 5 bytes instead of \d+"),
    ],
)
def test_faults_are_tried_again_then_told_in_one_line(local, remote, waits, fault, said):
    index = Index.load(URL, options(retries=3, timeout=7))
    entry = index.entries[1]
    remote.answers = [fault] * 3
    assert read_entry(index, entry) == read_entry(local, entry)
    assert len(remote.asked) == 5 and len(waits) == 3
    remote.answers = [fault] * 4
    cure = r"check the server, or raise data.retries \(now 3\) or data.timeout \(now 7 s\)"
    with pytest.raises(StorageError, match=rf"^{URL}/shard-00000.tar: {said}; tried 4 times; {cure}$"):
        read_entry(index, entry)


def test_waits_double_up_to_half_a_minute_and_differ(remote, waits):
    with pytest.raises(StorageError, match="tried 13 times"):
        remote.answers = [Status(500)] * 13
        Index.load(URL, options(retries=12))
    limits = [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30, 30, 30]
    assert all(limit / 2 <= wait <= limit for wait, limit in zip(waits, limits, strict=True))
    assert len(set(waits[6:])) > 1


@pytest.mark.parametrize(
    "fault, said",
    [
        (FileNotFoundError(2, "x"), "there is no such file; is the URL right"),
        (Status(404), "there is no such file; is the URL right"),
        (PermissionError(13, "x"), r"access is denied \(PermissionError.*credentials"),
        (Status(403), r"access is denied \(Status: 403.*credentials"),
        (OSError("Forbidden: gs"), r"access is denied \(OSError.*credentials"),
        (Status(416), r"the server rejects the request \(Status: 416.*is the shard there the one that the index describes"),
        (ValueError("no bucket"), r"it cannot be requested \(ValueError: no bucket\); is the URL right"),
        (b"x" * 2_000_000, "received 2000000 bytes instead of .* the server must support Range"),
    ],
)
def test_what_cannot_get_better_is_not_tried_again(remote, waits, fault, said):
    index = Index.load(URL)
    remote.answers = [fault]
    with pytest.raises(StorageError, match=f"^{URL}/shard-00000.tar: {said}"):
        read_entry(index, index.entries[0])
    assert not waits


def test_a_missing_set_is_named(remote):
    with pytest.raises(StorageError, match="^memory://elsewhere/index.json: there is no such file"):
        Index.load("memory://elsewhere")


def test_an_unknown_protocol_is_named():
    with pytest.raises(StorageError, match=r"^ftq:// is not supported; use a directory or a URL with http\(s\)://"):
        Index.load("ftq://host/set")


@pytest.mark.parametrize("protocol, package", [("http", "aiohttp"), ("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, protocol, package):
    monkeypatch.setitem(sys.modules, package, None)
    # Other tests may have used it already.
    monkeypatch.delitem(sys.modules, f"fsspec.implementations.{protocol}", raising=False)
    monkeypatch.delitem(import_module("fsspec.registry")._registry, protocol, raising=False)
    cure = r"pip install 'weakclip\[remote\]'"
    with pytest.raises(StorageError, match=rf"^{protocol}:// needs a package .* \(.*{package}.*\); {cure}$"):
        Index.load(f"{protocol}://host/set")


@pytest.mark.parametrize("cache", [False, True])
def test_a_sample_that_the_network_changed_is_read_again(local, remote, tmp_path, cache):
    index = Index.load(URL, options(tmp_path / "cache" if cache else None))
    entry = index.entries[1]
    data = bytearray((local.root / entry.shard).read_bytes())
    data[entry.offset + 5000] ^= 0xFF  # in the image, whose PNG has a checksum
    remote.answers = [bytes(data) if cache else bytes(data[entry.offset : entry.offset + entry.length])]
    assert (load(index, entry).image == load(local, entry).image).all()
    assert len(remote.asked) == 3


def test_a_sample_that_is_damaged_at_its_source_is_named(local, remote):
    index = Index.load(URL)
    remote.answers = [bytes(index.entries[0].length)] * 2
    with pytest.raises(ShardError, match="shard-00000.tar: image_0: "):
        load(index, index.entries[0])


def test_a_shard_that_is_another_than_the_indexs_is_fetched_twice_then_refused(remote, tmp_path):
    index = Index.load(URL, options(tmp_path / "cache"))
    shard = index.shards[0]
    remote.answers = [bytes(shard.bytes)] * 2
    with pytest.raises(StorageError, match=rf"SHA-256 is \w+, the index has {shard.sha256}, after 2 downloads; copy"):
        read_entry(index, index.entries[0])
    remote.answers = [bytes([n]) * shard.bytes for n in range(3)]  # other bytes each time: the network's fault
    assert read_entry(index, index.entries[0])
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_a_cache_that_cannot_be_written_is_named_with_the_option(remote, tmp_path):
    (tmp_path / "file").touch()
    index = Index.load(URL, options(tmp_path / "file"))
    with pytest.raises(StorageError, match=f"{tmp_path}/file: cannot store {URL}/shard-00000.tar .*set data.cache to another"):
        read_entry(index, index.entries[0])


def test_a_cache_smaller_than_the_shuffle_window_is_refused(local, remote, tmp_path):
    window = sum(sorted(shard.bytes for shard in local.shards)[1:]) / 2**30
    with pytest.raises(ConfigError, match=r"data.cache_gib=.*: the 2 largest shards are .* GiB .*lower data.shuffle_window"):
        Index.load(URL, options(tmp_path, cache_gib=0.99 * window, shuffle_window=2))
    Index.load(URL, options(tmp_path, cache_gib=1.01 * window, shuffle_window=2))
    Index.load(local.root, options(tmp_path, cache_gib=0.99 * window, shuffle_window=2))


@pytest.mark.parametrize("setting", ["cache_gib=0", "retries=-1", "timeout=0"])
def test_settings_out_of_range_are_refused(tiny_recipe, setting):
    with pytest.raises(ConfigError, match=f"data.{setting.partition('=')[0]} must be"):
        recipe.load(tiny_recipe, [f"data.{setting}"])


def test_each_process_has_a_filesystem_of_its_own():
    here = storages._filesystem("memory", 1.0, 1)
    assert here is storages._filesystem("memory", 1.0, 1) is not storages._filesystem("memory", 1.0, 2)


def test_nothing_is_retried_below(local):
    pytest.importorskip("s3fs")
    filesystem = storages._filesystem("s3", 5.0, 0)
    assert filesystem.retries == 1 and filesystem.config_kwargs["retries"] == {"total_max_attempts": 1}


def test_the_same_set_elsewhere_is_another_storage(local, remote):
    assert replace(local, storage=Storage.of(URL)) == Index.load(URL) != local
