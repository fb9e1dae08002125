"""Real COCO images, from labels to a retrained network: every stage, as its job runs it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import REPO
from tests.integration.conftest import metrics
from weakclip import recipe
from weakclip.data.index import Index
from weakclip.data.stream import StoredSamples
from weakclip.datasets import build
from weakclip.stages import chain

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
    return {"source": "coco", **files, "masks": "true", "processes": 1, "samples_per_shard": -(-count // 2)}


@pytest.fixture(scope="module")
def finished(launch, coco_mini, tiny_clip, tmp_path_factory):
    """A folder with the run and the shard sets of all stages, and their config."""
    folder = tmp_path_factory.mktemp("coco")
    val = some(coco_mini, "val2014", 4, folder)
    given = [f"--{name.replace('_', '-')}={value}" for name, value in val.items() if name not in ("source", "masks")]
    build.main(["coco", *given, "--masks", "--out", str(folder / "val")])
    source = ", ".join(f"{name}: {value}" for name, value in some(coco_mini, "train2014", 10, folder).items())
    where = (f"run={folder}/run", f"data.train={folder}/cams", f"data.val={folder}/val", f"data.labelled={folder}/labelled")
    clip = (f"clip.pretrained={tiny_clip}", "clip.image_size=64", "cam.background_names=[]", "cam.prompts=['{}']")
    config = recipe.load(REPO / "configs/coco_mini.yaml", [f"data.build={{{source}}}", *where, *clip, *SMALL])
    recipe.save(config, folder / "config.yaml")
    for stage in chain(config):
        launch(0, "tests.integration.run_stage", stage.name, folder / "config.yaml")
    return folder, config


def test_every_stage_is_complete(finished):
    folder, config = finished
    index, stages = Index.load(folder / "cams"), chain(config)
    assert [stage.name for stage in stages] == ["shards", "cam", "train", "pseudo", "retrain", "test", "evaluate"]
    assert all(stage.progress(config, index).complete for stage in stages)


def test_all_that_is_shown_was_made_of_the_pictures(finished):
    folder, _ = finished
    run = folder / "run"
    samples = [*StoredSamples(Index.load(folder / "cams"), Index.load(folder / "cams").entries, 0)]
    assert len(samples) == 10 and all(sample.cam.classes == sample.classes for sample in samples if sample.classes)
    for sample in samples:
        with Image.open(run / "pseudo" / f"{sample.name}.png") as mask:
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
