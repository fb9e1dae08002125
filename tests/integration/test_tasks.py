"""Trainings beside WeakCLIP: the classifier whose activations are CAMs, and the network on the pseudo masks."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.integration.conftest import metrics
from weakclip import recipe, test
from weakclip.cams import make
from weakclip.config import ConfigError
from weakclip.data.index import Index
from weakclip.data.reading import read_entry
from weakclip.data.sample import decode_sample
from weakclip.datasets import reshard
from weakclip.masks import mask_folder
from weakclip.masks.mask_folder import MaskSettings
from weakclip.training import jobs

RETRAIN = (
    "retrain.network=segformer",
    "retrain.backbone=b0",
    "retrain.augment.crop=64",
    "retrain.train.batch=2",
    "retrain.train.log_every=1",
    "retrain.optim.warmup=2",
    "retrain.optim.lr=1e-3",
    "retrain.optim.min_lr=1e-3",
    "retrain.head_lr=3",
)
TESTED = ("retrain.test.scales=[1.0]", "retrain.test.window=64", "retrain.test.stride=42")


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "set", count=5, per_shard=2)


@pytest.fixture
def begun(shards, tiny_config, tmp_path):
    """A config to retrain on, and the run's pseudo masks: class 1 on the left."""
    config = tiny_config(f"data.train={shards.root}", f"data.val={shards.root}", *RETRAIN, *TESTED)
    weights = tmp_path / "weights"
    weights.write_bytes(b"1")
    mask_folder.open_for_writing(Path(config.run) / "pseudo", MaskSettings.of(config), weights)
    for entry in shards.entries:
        mask_HW = np.zeros((48, 64), np.uint8)
        mask_HW[:, :20] = 1
        mask_folder.save(mask_HW, Path(config.run) / "pseudo" / f"{entry.key}.png")
    return config


@pytest.fixture
def train(launch, tiny_recipe, shards, tmp_path):
    def run(ranks, stage, *arguments, folder=tmp_path / "run", fails=False):
        options = (f"run={folder}", f"data.train={shards.root}", f"data.val={shards.root}")
        options = {text.split("=")[0]: text for text in (*options, *arguments)}.values()  # the last of a key counts
        return launch(ranks, "weakclip.train", "--stage", stage, "--config", tiny_recipe, *options, fails=fails)

    return run


def test_a_retraining_that_was_broken_off_goes_on_under_another_zero_stage(train, begun, tmp_path):
    def retrain(folder, stage):
        deepspeed = f"retrain.train.deepspeed=configs/deepspeed/zero{stage}.json"
        steps = ("retrain.train.steps=4", "retrain.train.checkpoint_every=2")
        options = (deepspeed, *steps, "retrain.optim.optimizer=sgd", "--resume=auto")
        train(0, "retrain", *RETRAIN, *options, folder=folder)

    shutil.copytree(begun.run, tmp_path / "broken")
    retrain(begun.run, stage=0)
    retrain(tmp_path / "broken", stage=2)
    (tmp_path / "broken/retrain/segformer/checkpoints/step-4.safetensors").unlink()  # as if it had been killed after step 2
    retrain(tmp_path / "broken", stage=3)
    whole, broken = Path(begun.run) / "retrain/segformer", tmp_path / "broken/retrain/segformer"
    assert metrics(broken) == pytest.approx(metrics(whole), abs=1e-4)
    assert len(metrics(whole)) == 4 and (whole / "best.json").is_file()
    theirs = load_file(whole / "weights/last.safetensors")
    for name, tensor in load_file(broken / "weights/last.safetensors").items():
        np.testing.assert_allclose(tensor, theirs[name], atol=1e-4, err_msg=name)


def test_pseudo_masks_in_shards_are_as_good_as_in_the_run(train, begun, shards, tmp_path):
    reshard.main([str(shards.root), "--seeds", f"{begun.run}/pseudo", "--out", f"{tmp_path}/set", "--samples-per-shard", "2"])
    train(0, "retrain", *RETRAIN, "retrain.train.steps=2")
    train(0, "retrain", *RETRAIN, "retrain.train.steps=2", "retrain.targets=seeds", f"data.train={tmp_path}/set")
    run = Path(begun.run) / "retrain"
    assert metrics(run / "segformer-seeds") == metrics(run / "segformer")
    assert len(metrics(run / "segformer")) == 2


def test_a_retrained_network_is_tested_in_parts(train, begun, capsys, tmp_path):
    train(0, "retrain", *RETRAIN, "retrain.train.steps=1")
    for part in ("2:3", "0:2"):
        test.run(begun, part)
    run = jobs.retrain(begun).run.root
    assert len(list((run / "masks-val").glob("*.png"))) == 5 and "mean " in capsys.readouterr().out
    recipe.save(begun, tmp_path / "recipe.yaml")
    parts = (run / "scores-val.json").read_bytes()
    test.main(["--config", str(tmp_path / "recipe.yaml"), "--archive", str(tmp_path / "comp6.tar")])
    assert (run / "scores-val.json").read_bytes() == parts
    with tarfile.open(tmp_path / "comp6.tar") as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive}
    masks_of_val = (run / "masks-val").glob("*.png")
    folder = "results/VOC2012/Segmentation/comp6_test_cls"
    assert found == {f"{folder}/{path.name}": path.read_bytes() for path in masks_of_val}


CLASSIFY = (
    "cam.source=mctformer",
    "cam.attention_blocks=3",
    "cam.affinity_steps=1",
    "cam.flip=true",
    "classify.backbone=deit_tiny_patch16_224",
    "classify.augment.crop=64",
    "classify.train.batch=2",
    "classify.train.steps=3",
)


def test_mctformer_learns_from_labels_and_makes_the_cams(train, tiny_config, shards, tmp_path):
    where = (f"data.labelled={shards.root}", f"data.train={tmp_path}/cams", "data.val=null")
    config = tiny_config(*where, *CLASSIFY)
    train(0, "classify", *where, *CLASSIFY)
    run = jobs.classify(config).run.root
    assert run == tmp_path / "run/classify" and set(metrics(run, "loss/patch")) == {3}
    for part in ("0:1", "1:3"):
        make.run(config, part)
    index = Index.load(tmp_path / "cams")
    for entry in index.entries:
        sample = decode_sample(read_entry(index, entry), entry, len(index.classes))
        assert sample.cam is not None and sample.cam.classes == sample.classes and sample.cam.maps_nhw.max() == 255
    assert make.written(config, shards) == 3
    for path in (run / "weights").iterdir():
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match="cams was made with another cam"):
        make.written(config, shards)
