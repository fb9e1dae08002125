"""Training from real servers with faults: the same samples as from disk, or one clear error."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import fsspec
import pytest

from tests.integration import faulty_server
from tests.integration.conftest import ENVIRONMENT
from weakclip import evaluate
from weakclip.config import Config, DataConfig
from weakclip.data import storage
from weakclip.data.index import Index, ShardError, open_index
from weakclip.data.reading import read_entry
from weakclip.data.storage import Storage, StorageError
from weakclip.data.stream import Batch, StoredSamples, StreamSettings, training_batches
from weakclip.masks.seeds import seed_mask

NAMES = ("background", "cat", "dog", "cow")


@pytest.fixture(scope="module")
def local(tmp_path_factory, make_shards) -> Index:
    """Seven samples in shards of 3, 3 and 1."""
    return make_shards(tmp_path_factory.mktemp("remote") / "set")


@pytest.fixture(scope="module")
def proxies(local) -> Iterator[dict[str, str]]:
    """Addresses by protocol. They run in a process of their own, so that no thread of theirs is there when workers fork."""
    server = subprocess.Popen(
        [sys.executable, faulty_server.__file__, str(local.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT
    )
    assert server.stdout
    yield json.loads(server.stdout.readline())
    server.terminate()
    server.wait()


@pytest.fixture
def faults(proxies) -> Callable[[str], int]:
    """`faults(protocol)`: how often a proxy got in the way since it was asked last; the test finds it fresh."""

    def count(protocol: str) -> int:
        with urllib.request.urlopen(urllib.request.Request(proxies[protocol], method="POST"), timeout=20) as answer:
            return int(answer.read())

    for protocol in proxies:
        count(protocol)
    return count


@pytest.fixture
def url(proxies, faults, monkeypatch) -> Callable[[str, str], str]:
    """`url(protocol, fault)`: the set behind that fault."""
    monkeypatch.setattr(storage, "_FIRST_WAIT", 0.01)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxies["s3"])
    return lambda protocol, fault: f"s3://{fault}/set" if protocol == "s3" else f"{proxies['http']}/{fault}"


@pytest.fixture
def settings(tiny_config, tmp_path) -> Callable[..., Config]:
    """`settings(cache, *overrides)`: a config with or without a cache."""

    def make(cache: bool, *overrides: str) -> Config:
        directory = [f"data.cache={tmp_path / 'cache'}"] if cache else []
        return tiny_config("data.retries=8", "data.timeout=2", *directory, *overrides)

    return make


def batches(index: Index, config: Config, count: int = 4) -> list[Batch]:
    return list(islice(training_batches(index, StreamSettings.of(config), partial(seed_mask, config=config.seeds)), count))


def same(found: list[Batch], wanted: list[Batch]) -> bool:
    pairs = list(zip(found, wanted, strict=True))
    keys = all(a.keys == b.keys and a.bad == b.bad == [] for a, b in pairs)
    return keys and all(a.images.equal(b.images) and a.seeds.equal(b.seeds) for a, b in pairs)


# ----------------------------------------------------------------------------------------------------- faults that pass


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("fault", faulty_server.ONCE)
def test_a_fault_that_passes_changes_nothing(local, url, faults, settings, fault, cache):
    config = settings(cache, "data.timeout=0.3")
    index = open_index(url("http", fault), NAMES, config.data)
    assert same(batches(index, config), batches(local, config))
    assert faults("http") >= (4 if cache else 8)  # the index and three shards, or seven samples


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("protocol", ["http", "s3"])
@pytest.mark.parametrize("fault", ["plain", "mixed"])
def test_batches_are_those_from_disk(local, url, faults, settings, protocol, fault, workers, cache):
    config = settings(cache, f"data.workers={workers}")
    index = open_index(url(protocol, fault), NAMES, config.data)
    assert same(batches(index, config), batches(local, settings(False)))
    assert (faults(protocol) > 2) == (fault == "mixed")


def test_stored_samples_and_scores_come_from_a_url_too(local, url, settings, tmp_path):
    config = settings(True, "data.workers=2")
    index = open_index(url("http", "mixed"), NAMES, config.data)
    found, wanted = (list(StoredSamples(i, i.entries, workers)) for i, workers in ((index, 2), (local, 0)))
    assert all(a.name == b.name and (a.image == b.image).all() for a, b in zip(found, wanted, strict=True))
    assert evaluate.run(config, "seeds", url("http", "plain"), "0:2", tmp_path).miou == 1.0


def test_google_storage_is_read_through_its_interface(local, url, proxies, settings, monkeypatch):
    """No server of Google's is at hand; one that knows the two requests stands in."""
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxies["http"] + "/plain")
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    index = open_index("gs://bucket/set", NAMES, settings(False).data)
    assert read_entry(index, index.entries[4]) == read_entry(local, local.entries[4])
    with pytest.raises(StorageError, match=r"gs://bucket/set/absent: there is no such file"):
        index.storage.read("absent")


# ---------------------------------------------------------------------------------------------------- faults that remain


@pytest.mark.parametrize("protocol", ["http", "s3"])
@pytest.mark.parametrize(
    "fault, said",
    [
        ("down", r"Service Unavailable.*; tried 3 times; check .* data.retries \(now 2\) or data.timeout \(now 5 s\)"),
        ("deaf", r"no complete answer within 0.3 s; tried 3 times; check the server, or raise data.retries"),
        ("forbidden", r"access is denied \(.*check that the environment has credentials"),
        ("plain", r"there is no such file; is the URL right, and was all of the shard set copied there"),
    ],
)
def test_a_fault_that_remains_is_one_line(local, url, protocol, fault, said):
    remote = Storage.of(url(protocol, fault), DataConfig(retries=2, timeout=0.3 if fault == "deaf" else 5.0))
    with pytest.raises(StorageError, match=rf"^{remote}/absent: .*{said}[^\n]*$"):
        remote.read("absent")


@pytest.mark.parametrize("workers, cache", [(0, False), (0, True), (1, True)])  # torch takes 5 seconds to end each worker
def test_training_ends_with_that_line_and_skips_no_sample_for_it(local, url, settings, workers, cache):
    config = settings(cache, f"data.workers={workers}", "data.retries=1", "data.max_bad_samples=100")
    index = replace(local, storage=Storage.of(url("http", "down"), config.data))
    with pytest.raises(StorageError, match=r"^http://\S+/down/shard-0000\d.tar: [^\n]*503[^\n]*; tried 2 times; [^\n]*$"):
        batches(index, config, 1)


def test_wrong_bytes_that_remain_are_refused_by_checksum_or_as_damaged_samples(local, url, settings):
    config = settings(True)
    index = open_index(url("http", "lying"), NAMES, config.data)
    with pytest.raises(StorageError, match=r"/lying/shard-0000\d.tar: SHA-256 is .*, after 2 downloads; copy the shard set"):
        batches(index, config, 1)
    config = settings(False, "data.max_bad_samples=2")
    index = open_index(url("http", "lying"), NAMES, config.data)
    with pytest.raises(ShardError, match=r"more than data.max_bad_samples=2 unreadable samples; the last: .*image_\d"):
        batches(index, config, 1)


# ---------------------------------------------------------------------------------------------------------- one cache


def read_all(index: Index, order: list[int], wanted: list[dict[str, bytes]]) -> None:
    for number in order:
        assert read_entry(index, index.entries[number]) == wanted[number]


def test_four_processes_keep_one_cache_within_its_limit(local, url, tmp_path):
    largest = max(shard.bytes for shard in local.shards)
    options = DataConfig(cache=str(tmp_path / "cache"), cache_gib=1.5 * largest / 2**30, timeout=2, shuffle_window=1)
    wanted = [read_entry(local, entry) for entry in local.entries]
    orders = [[*range(7)] * 2, [6, 5, 4, 3, 2, 1, 0] * 2, [0, 3, 6, 1, 4, 2, 5] * 2, [5, 2, 6, 0, 4, 3, 1] * 2]
    index = Index.load(url("http", "mixed"), options)
    context = multiprocessing.get_context("fork")  # loader processes are started in this way
    processes = [context.Process(target=read_all, args=(index, order, wanted)) for order in orders]
    for process in processes:
        process.start()
    sizes = []
    while any(process.is_alive() for process in processes):
        sizes.append(taken(tmp_path / "cache"))
        time.sleep(0.005)
    assert [process.exitcode for process in processes] == [0] * 4
    assert 0 < max(sizes) <= 1.5 * largest
    assert not list((tmp_path / "cache").glob("*.partial"))


def taken(directory: Path) -> int:
    """Bytes of the files in a directory that others change; 0 where one left after it was listed."""
    try:
        return sum(path.stat().st_size for path in directory.glob("*.tar*"))
    except FileNotFoundError:
        return 0
