"""Writing shard sets: interrupted and resumed, by one process or many jobs."""

from __future__ import annotations

import io
import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from weakclip.data.index import Index, ShardError
from weakclip.data.sample import Sample
from weakclip.datasets.writing import Build, build_shards

NAMES = ("background", "cat", "dog")


@dataclass
class Samples:
    """Makes samples, and notes of which. broken: those that cannot be made. shade: of all samples."""

    shade: int = 7
    broken: set[int] = field(default_factory=set)
    made: list[int] = field(default_factory=list)

    def __call__(self, number: int) -> Sample:
        if number in self.broken:
            raise ShardError(f"image_{number} is broken")
        self.made.append(number)
        buffer = io.BytesIO()
        Image.new("RGB", (8, 6), (self.shade, number, 0)).save(buffer, "PNG")
        return Sample(f"image_{number}", buffer.getvalue(), "png", (1,), 6, 8, "made up")


def build(out: Path, samples: Samples, count: int = 9, about: int = 1, versions: dict[int, int] | None = None) -> Build[int]:
    """Of `count` samples, two a shard."""
    made_of = {"about": about}
    return Build(
        range(count), samples, out, NAMES, 2, provenance=made_of, version=lambda number: str((versions or {}).get(number))
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(tmp_path) -> dict[str, bytes]:
    """The files of the set when nothing happens."""
    build(tmp_path / "whole", Samples()).run()
    return contents(tmp_path / "whole")


def test_a_job_that_fails_first_leaves_the_others_alone(tmp_path, whole):
    class Failing(Samples):
        """Of the second shard, whose job fails as another begins the third."""

        def __call__(self, number: int) -> Sample:
            if number == 4:
                with pytest.raises(ShardError, match="image_2 is broken"):
                    build(tmp_path / "set", Samples(broken={2})).run(numbers=range(1, 2))
            return super().__call__(number)

    build(tmp_path / "set", Failing()).run(numbers=range(2, 3))
    build(tmp_path / "set", Samples()).run()
    assert contents(tmp_path / "set") == whole


def test_shards_may_be_of_different_sizes(tmp_path):
    sizes = [2, 1, 4, 2]
    index = Build(range(9), Samples(), tmp_path / "set", NAMES, sizes).run()
    assert index is not None and [len(shard.samples) for shard in index.shards] == sizes
    assert [entry.key for entry in index.entries] == [f"image_{number}" for number in range(9)]


def test_a_build_that_failed_resumes_with_what_is_missing(tmp_path, whole):
    broken, mended = Samples(broken={5}), Samples()
    with pytest.raises(ShardError, match="image_5 is broken"):
        build(tmp_path / "set", broken).run()
    assert broken.made == [0, 1, 2, 3, 4] and not (tmp_path / "set").exists()
    index = build(tmp_path / "set", mended).run()
    assert mended.made == [4, 5, 6, 7, 8]
    assert contents(tmp_path / "set") == whole and index == Index.load(tmp_path / "set")
    assert not (tmp_path / "set.partial").exists()


def test_parts_that_an_earlier_version_wrote_have_no_findings(tmp_path, whole):
    build(tmp_path / "set", Samples()).run(numbers=range(1))
    note = tmp_path / "set.partial/shard-00000.json"
    note.write_text(json.dumps({name: value for name, value in json.loads(note.read_text()).items() if name != "findings"}))
    build(tmp_path / "set", Samples()).run()
    assert contents(tmp_path / "set") == whole


def test_an_image_that_changed_meanwhile_is_written_again(tmp_path):
    with pytest.raises(ShardError):
        build(tmp_path / "set", Samples(broken={6})).run()
    changed = Samples(shade=200)
    build(tmp_path / "set", changed, versions={2: 1}).run()
    assert changed.made == [2, 3, 6, 7, 8]


def test_another_build_in_the_same_place_is_refused(tmp_path):
    with pytest.raises(ShardError):
        build(tmp_path / "set", Samples(broken={6})).run()
    with pytest.raises(ShardError, match=r"set\.partial: holds another unfinished build .*build\.json.*remove it"):
        build(tmp_path / "set", Samples(), about=2).run()
    with pytest.raises(ShardError, match="holds another unfinished build"):
        build(tmp_path / "set", Samples(), count=11).run()


def test_a_build_that_wrote_nothing_leaves_nothing(tmp_path):
    with pytest.raises(ShardError, match="image_0 is broken"):
        build(tmp_path / "set", Samples(broken={0})).run()
    assert list(tmp_path.iterdir()) == []


def test_files_of_unknown_origin_are_not_touched(tmp_path):
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / "thesis.tex").touch()
    with pytest.raises(ShardError, match="holds files that are not an unfinished build"):
        build(tmp_path / "set", Samples()).run()
    assert (tmp_path / "set.partial" / "thesis.tex").exists()


@pytest.mark.parametrize("seed", range(5))
def test_jobs_share_a_build_and_the_last_finishes_it(tmp_path, whole, seed):
    parts = [range(0, 1), range(1, 3), range(3, 4), range(4, 5)]
    random.Random(seed).shuffle(parts)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda part: build(tmp_path / "set", Samples()).run(numbers=part), parts))
    assert any(index is not None for index in found)
    assert contents(tmp_path / "set") == whole


def test_a_part_alone_finishes_nothing(tmp_path, whole):
    assert build(tmp_path / "set", Samples()).run(numbers=range(3)) is None
    assert not (tmp_path / "set").exists()
    assert build(tmp_path / "set", Samples()).run(numbers=range(3, 5)) is not None
    assert contents(tmp_path / "set") == whole


def test_what_made_it_stands_beside_it(tmp_path, whole):
    assert json.loads(whole["build.json"]) == {"about": 1, "shards": 5}
    build_shards(range(9), Samples(), tmp_path / "set", NAMES, samples_per_shard=2)
    assert contents(tmp_path / "set").keys() == whole.keys() - {"build.json"}
