"""Other projects' readers on our shard sets: webdataset opens the tar files, wids opens index.json."""

from __future__ import annotations

import json
import shutil

import pytest
import webdataset
import wids

from weakclip.data.index import Index
from weakclip.data.reading import read_entry


@pytest.fixture(scope="module")
def index(make_shards, tmp_path_factory) -> Index:
    return make_shards(tmp_path_factory.mktemp("shards") / "set")


@pytest.fixture(scope="module")
def parts(index) -> dict[str, dict[str, bytes]]:
    """Key -> extension -> bytes, as our reader finds them."""
    return {entry.key: read_entry(index, entry) for entry in index.entries}


def test_webdataset_finds_the_same_keys_and_bytes(index, parts):
    urls = [str(index.root / shard.name) for shard in index.shards]
    found = {
        sample["__key__"]: {name: data for name, data in sample.items() if not name.startswith("__")}
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    }
    assert list(found) == list(parts) and found == parts


@pytest.mark.parametrize("in_place", [True, False])
def test_wids_finds_the_same_keys_and_bytes_in_any_order(index, parts, tmp_path, in_place):
    before = sorted(path.name for path in index.root.iterdir())
    cache = index.root if in_place else tmp_path
    dataset = wids.ShardListDataset(str(index.root / "index.json"), cache_dir=str(cache), transformations=[])
    assert len(dataset) == len(parts)
    for number in reversed(range(len(parts))):
        sample = dataset[number]
        assert sample["__key__"] == index.entries[number].key
        found = {name[1:]: stream.read() for name, stream in sample.items() if name.startswith(".")}
        assert found == parts[sample["__key__"]]
    dataset.close()
    assert sorted(path.name for path in index.root.iterdir()) == before


def test_an_index_without_the_keys_of_wids_still_opens(index, tmp_path):
    shutil.copytree(index.root, tmp_path / "older")
    file = tmp_path / "older/index.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({name: raw[name] for name in ("format", "classes", "shards")}))
    older = Index.load(tmp_path / "older")
    assert (older.classes, older.shards) == (index.classes, index.shards)
