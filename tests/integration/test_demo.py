"""A demo run much smaller than the shipped one: the whole pipeline runs, and its output is complete."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from weakclip.data.index import open_index
from weakclip.data.stream import StoredSamples
from weakclip.labels import DEMO

SMALL = ("demo.size=8", "train.steps=2", "train.batch=2", "train.validate_images=1", "data.workers=0")


def demo(launch, run, *arguments):
    return launch(0, "weakclip.demo", "--config", "configs/demo.yaml", f"run={run}", *SMALL, *arguments)


def samples(run):
    index = open_index(str(run / "shards" / "train"), DEMO)
    return StoredSamples(index, index.entries, 0)


def test_the_demo_scores_cams_and_weakclip_on_seen_and_unseen_images(launch, tmp_path):
    run = tmp_path / "run"
    done = demo(launch, run)
    scores = json.loads((run / "scores.json").read_text())
    assert set(scores) == {"cam", "cam_crf", "weakclip", "weakclip_crf", "unseen_weakclip", "unseen_weakclip_crf"}
    assert all(0 < value < 100 for value in scores.values())
    assert re.search(rf"^WeakCLIP \+ dense CRF +{scores['weakclip_crf']:.1f}  \d\d\.\d ± \d\.\d$", done.stdout, re.MULTILINE)
    assert len(list((run / "masks" / "weakclip").glob("*.png"))) == 8
    assert len(list((run / "masks" / "unseen_weakclip").glob("*.png"))) == 8
    assert Image.open(run / "pictures.png").width > 1000
    assert all(sample.cam is not None and sample.seed is not None for sample in samples(run))
    again = demo(launch, run)  # finished work is kept
    assert json.loads((run / "scores.json").read_text()) == scores
    assert "labelled: " in done.stderr and "labelled: " not in again.stderr
    with pytest.raises(AssertionError, match="was started with other settings .demo.seed: 0 -> 1.; keep those of"):
        demo(launch, run, "demo.seed=1")


def test_exact_seeds_give_the_ceiling(launch, tmp_path):
    demo(launch, tmp_path / "run", "demo.seeds=exact")
    assert "ceiling" in json.loads((tmp_path / "run" / "scores.json").read_text())
    assert all(np.array_equal(sample.seed, sample.mask) for sample in samples(tmp_path / "run"))
