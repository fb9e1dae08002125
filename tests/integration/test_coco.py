"""Real COCO files, end to end: shards -> training on two ranks -> pseudo masks -> scores. The CAMs are simulated."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.integration.conftest import ENVIRONMENT, REPO, metrics
from tests.simulated_cams import write
from weakclip.data.shard import Index

RECIPE = "configs/coco_mini.yaml"


def script(*arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, cwd=REPO, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def shards(coco_mini, tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    source = {"images": coco_mini / "train2014", "annotations": coco_mini / "annotations" / "instances_train2014.json"}
    write(**source, out=folder / "simulated_cams")
    options = [part for name, path in source.items() for part in (f"--{name}", path)]
    script("shards/build.py", "coco", *options, "--cams", folder / "simulated_cams", "--masks", "--samples-per-shard", 8,
           "--processes", 2, "--out", folder / "shards")  # fmt: skip
    assert "0 problems" in script("shards/verify.py", folder / "shards")
    return Index.load(folder / "shards")


def test_coco_from_images_to_scores(launch, shards, tmp_path):
    run = tmp_path / "run"
    common = ("--config", RECIPE, f"run={run}", f"data.train={shards.root}", "data.workers=0")
    launch(2, "weakclip.train", *common, "train.steps=30", "train.batch=4", "train.log_every=5")
    losses = list(metrics(run).values())
    assert losses[-1] < 0.8 * losses[0]
    launch(0, "weakclip.pseudo", *common, "--shards", "0", "pseudo.scales=[1.0]", "pseudo.flip=false")
    first = shards.shards[0].samples
    masks = {path.stem: Image.open(path) for path in (run / "pseudo").glob("*.png")}
    assert masks.keys() == {entry.key for entry in first}
    assert all(mask.mode == "P" and np.asarray(mask).max() <= 80 for mask in masks.values())
    done = launch(0, "weakclip.evaluate", *common, "--shards", "0")
    scores = json.loads((run / "scores-masks.json").read_text())
    assert len(scores["iou"]) == 81
    assert f"{scores['miou']:.2f}" in done.stdout
