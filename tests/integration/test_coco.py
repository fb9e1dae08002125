"""Real COCO images, from labels to a retrained network: every stage, as launch/submit.py runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.integration.conftest import ENVIRONMENT, REPO, metrics
from weakclip.data.index import Index
from weakclip.data.stream import StoredSamples

SMALL = (
    "data.workers=0",
    "data.scale=[512,128]",
    "augment.crop=128",
    "optim.warmup=2",
    "train.steps=12",
    "train.log_every=5",
    "train.batch=4",
    "train.pictures=0",
    "pseudo.scales=[1.0]",
    "pseudo.flip=false",
    "pseudo.crf.iterations=2",
    "retrain.network=segformer",
    "retrain.backbone=b0",
    "retrain.augment.crop=128",
    "retrain.optim.lr=1e-3",
    "retrain.optim.warmup=2",
    "retrain.train.steps=4",
    "retrain.train.batch=2",
    "retrain.train.log_every=1",
    "retrain.train.pictures=0",
    "retrain.train.validate_images=4",
    "retrain.train.deepspeed=configs/deepspeed/zero1.json",
    "retrain.test.scales=[1.0]",
    "retrain.test.flip=false",
    "retrain.test.window=240",
    "retrain.test.stride=160",
    "retrain.test.crf=null",
)


def script(*arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, cwd=REPO, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def some(coco_mini, split, count, folder):
    """`data.build` for the first images of a split."""
    found = json.loads((coco_mini / "annotations" / f"instances_{split}.json").read_text())
    found["images"] = sorted(found["images"], key=lambda image: image["id"])[:count]
    ids = {image["id"] for image in found["images"]}
    found["annotations"] = [annotation for annotation in found["annotations"] if annotation["image_id"] in ids]
    (folder / split).mkdir()
    for image in found["images"]:
        (folder / split / image["file_name"]).symlink_to(coco_mini / split / image["file_name"])
    annotations = folder / f"{split}.json"
    annotations.write_text(json.dumps(found))
    files = {"images": folder / split, "annotations": annotations}
    return {"source": "coco", **files, "masks": "true", "processes": 2, "samples_per_shard": -(-count // 2)}


@pytest.fixture(scope="module")
def finished(coco_mini, tiny_clip, tmp_path_factory):
    """A folder with the run and the shard sets of all stages, and what they said."""
    folder = tmp_path_factory.mktemp("coco")
    val = some(coco_mini, "val2014", 4, folder)
    given = [f"--{name.replace('_', '-')}={value}" for name, value in val.items() if name not in ("source", "masks")]
    script("shards/build.py", "coco", *given, "--masks", "--out", folder / "val")
    build = ", ".join(f"{name}: {value}" for name, value in some(coco_mini, "train2014", 10, folder).items())
    where = (f"run={folder}/run", f"data.train={folder}/cams", f"data.val={folder}/val", f"data.labelled={folder}/labelled")
    clip = (f"clip.pretrained={tiny_clip}", "clip.image_size=64", "cam.background_names=[]", "cam.prompts=['{}']")
    recipe = ("--config", "configs/coco_mini.yaml", f"data.build={{{build}}}", *where, *clip, *SMALL)
    done = script("launch/submit.py", "--stage", "all", "--cluster", "local", "--array-size", 1, *recipe)
    return folder, done.stdout


def test_every_stage_runs_in_its_turn(finished):
    said = [line.partition(":")[0] for line in finished[1].splitlines() if ": on this machine" in line]
    assert said == ["shards", "cam", "train", "pseudo", "retrain", "test", "evaluate"]


def test_all_that_is_shown_was_made_of_the_pictures(finished):
    folder, _ = finished
    run = folder / "run"
    samples = [*StoredSamples(Index.load(folder / "cams"), Index.load(folder / "cams").entries, 0)]
    assert len(samples) == 10 and all(sample.cam.classes == sample.classes for sample in samples if sample.classes)
    for sample in samples:
        with Image.open(run / "pseudo" / f"{sample.key}.png") as mask:
            assert mask.mode == "P" and mask.size == sample.image.shape[1::-1] and np.asarray(mask).max() <= 80
    assert len(list((run / "retrain/segformer/masks-val").glob("*.png"))) == 4


def test_both_networks_learn(finished):
    run = finished[0] / "run"
    for folder in (run, run / "retrain/segformer"):
        losses = [*metrics(folder).values()]
        assert losses[-1] < losses[0]


def test_masks_and_predictions_are_scored(finished):
    run = finished[0] / "run"
    for path in (run / "scores-masks.json", run / "retrain/segformer/scores-val.json"):
        assert len(json.loads(path.read_text())["iou"]) == 81
