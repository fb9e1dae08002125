"""Scores counted shard by shard: independent of the number of jobs, and counts of other masks are ignored."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weakclip import evaluate
from weakclip.data.index import Index
from weakclip.data.stream import StoredSamples
from weakclip.evaluation import scoring
from weakclip.evaluation.score_files import Scored
from weakclip.masks import mask_folder
from weakclip.masks.mask_folder import MaskSettings
from weakclip.runtime.run_dir import RunDir


@pytest.fixture
def judged(make_shards, tiny_config, tmp_path):
    """A config with random masks of seven images in three shards, and the shard set."""
    index = make_shards(tmp_path / "set")
    config = tiny_config(f"data.train={index.root}")
    folder = Path(config.run) / "pseudo"
    weights = tmp_path / "weights"
    weights.write_bytes(b"1")
    mask_folder.open_for_writing(folder, MaskSettings.of(config), weights)
    for number, entry in enumerate(index.entries):
        mask_folder.save(np.random.default_rng(number).integers(0, 3, (48, 64), np.uint8), folder / f"{entry.key}.png")
    return config, index


@pytest.fixture(scope="module")
def images(make_shards, tmp_path_factory) -> list:
    """Seven samples, with their masks."""
    index = make_shards(tmp_path_factory.mktemp("images") / "set")
    return list(StoredSamples(index, index.entries, 0))


def whole(run: Path) -> dict:
    return json.loads(Scored.pseudo(RunDir(run)).whole.read_text())


@pytest.mark.parametrize("parts", [[None], ["0:1", "1:3"], ["2:3", "0:1", "1:2"], ["0:3", "0:3"]], ids=str)
def test_parts_add_up_to_the_whole(judged, parts):
    config, index = judged
    run = Path(config.run)
    for number, part in enumerate(parts):
        assert number == 0 or part == "0:3" or not Scored.pseudo(RunDir(run)).whole.exists()
        evaluate.run_part(config, part)
    at_once = evaluate.run(config, "masks", str(index.root), None, run / "pseudo")
    assert whole(run) == {**at_once.as_dict(), "masks": mask_folder.read_provenance(run / "pseudo")}


def test_scores_of_a_version_that_noted_the_batch_of_windows_stay_valid(judged):
    config, index = judged
    place = Scored.pseudo(RunDir(Path(config.run)))
    evaluate.run_part(config, None)
    assert place.done(index) == (3, 3)
    about = place.masks / "about.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"window_batch": 4}))
    for path in [place.whole, *place.folder.glob("*.json")]:
        found = json.loads(path.read_text())
        path.write_text(json.dumps(found | {"masks": found["masks"] | {"window_batch": 4}}))
    assert place.done(index) == (3, 3)


@given(st.lists(st.integers(0, 6), max_size=6), st.randoms())
@settings(deadline=None, max_examples=15)
def test_the_counts_of_any_parts_add_up_to_the_same_integers(images, cuts, random):
    """As ranks, shards or tasks may cut and order the images."""
    names, count = (
        ("background", "cat", "dog"),
        lambda some: scoring.count(some, lambda sample: sample.image[..., 0] % 3, 3),
    )
    shuffled = random.sample(images, len(images))
    bounds = [0, *sorted(cuts), len(images)]
    parts = [count(shuffled[start:stop]) for start, stop in pairwise(bounds)]
    together, whole = sum(parts[1:], start=parts[0]), count(images)
    np.testing.assert_array_equal(together.matrix_KK, whole.matrix_KK)
    np.testing.assert_array_equal(together.boundary_K2, whole.boundary_K2)
    assert whole.boundary_K2.sum() > 0 and together.scores(names).as_dict() == whole.scores(names).as_dict()


def test_counts_of_an_earlier_version_are_counted_anew(judged):
    config, index = judged
    run = Path(config.run)
    evaluate.run_part(config, None)
    now = whole(run)
    earlier = run / "scores" / f"{index.shards[0].name}.json"
    earlier.write_text(json.dumps({key: value for key, value in json.loads(earlier.read_text()).items() if key != "boundary"}))
    assert [Scored.pseudo(RunDir(run)).counts(shard.name) is None for shard in index.shards] == [True, False, False]
    Scored.pseudo(RunDir(run)).whole.write_text(json.dumps({key: now[key] for key in ("miou", "iou", "masks")}))
    assert Scored.pseudo(RunDir(run)).done(index) == (2, 3) and Scored.pseudo(RunDir(run)).add_up(index) is None
    evaluate.run_part(config, None)
    assert Scored.pseudo(RunDir(run)).done(index) == (3, 3) and whole(run) == now


def test_a_shard_that_is_counted_is_not_read_again(judged):
    config, _ = judged
    evaluate.run_part(config, "0:1")
    (Path(config.run) / "pseudo" / "image_0.png").unlink()
    evaluate.run_part(config, None)
    assert whole(Path(config.run))["miou"] > 0


def test_counts_of_other_masks_are_counted_anew(judged, tmp_path):
    config, index = judged
    run = Path(config.run)
    evaluate.run_part(config, None)
    before = whole(run)
    (run / "pseudo" / "about.json").write_text('{"weights": "others"}')
    place = Scored.pseudo(RunDir(run))
    assert all(place.counts(shard.name) is None for shard in index.shards) and place.add_up(index) is None
    for entry in index.entries:
        mask_folder.save(np.zeros((48, 64), np.uint8), run / "pseudo" / f"{entry.key}.png")
    evaluate.run_part(config, None)
    assert whole(run)["masks"] == {"weights": "others"} and whole(run)["miou"] != before["miou"]


def test_a_shard_without_samples_keeps_nobody_waiting(judged, tmp_path):
    config, index = judged
    raw = json.loads((index.root / "index.json").read_text())
    raw["shards"].append({"name": "shard-00009.tar", "bytes": 10240, "sha256": "0" * 64, "samples": []})
    (index.root / "shard-00009.tar").write_bytes(bytes(10240))
    (index.root / "index.json").write_text(json.dumps(raw))
    assert len(Index.load(index.root).shards) == 4
    evaluate.run_part(config, None)
    assert whole(Path(config.run))["miou"] > 0
