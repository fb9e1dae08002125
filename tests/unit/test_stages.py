"""How far each stage is, as launch/submit.py and launch/status.py ask."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from weakclip import config as configs
from weakclip import masks, scores
from weakclip.config import ConfigError
from weakclip.stages import STAGES


@pytest.fixture
def begun(make_shards, tiny_config, tmp_path):
    index = make_shards(tmp_path / "set")
    config = tiny_config(f"data.train={index.root}", "train.steps=40")
    (Path(config.run) / "checkpoints").mkdir(parents=True)
    (Path(config.run) / "weights").mkdir()
    return config, index, Path(config.run)


def test_a_training_is_as_far_as_its_newest_checkpoint(begun):
    config, index, run = begun
    assert not STAGES["train"].progress(config, index).complete
    for step, shown in ((5, "5/40 steps"), (40, "40/40 steps")):
        (run / "checkpoints" / f"step-{step}.safetensors").touch()
        assert str(STAGES["train"].progress(config, index)) == shown
    assert STAGES["train"].progress(config, index).complete


def test_masks_are_counted_if_they_are_of_these_weights_and_options(begun, tiny_config):
    config, index, run = begun
    assert STAGES["pseudo"].progress(config, index).done == 0
    (run / "weights" / "last.safetensors").write_bytes(b"1")
    masks.claim(run / "pseudo", config, run / "weights" / "last.safetensors")
    masks.save(np.zeros((48, 64), np.uint8), run / "pseudo" / "image_3.png")
    assert str(STAGES["pseudo"].progress(config, index)) == "1/7 images"
    (run / "weights" / "best.safetensors").write_bytes(b"2")
    with pytest.raises(ConfigError, match="pseudo holds masks of other weights or options .*remove it or set run anew"):
        STAGES["pseudo"].progress(config, index)


def test_scores_are_counted_by_shards(begun):
    config, index, run = begun
    assert str(STAGES["evaluate"].progress(config, index)) == "0/3 shards"
    (run / "weights" / "last.safetensors").write_bytes(b"1")
    masks.claim(run / "pseudo", config, run / "weights" / "last.safetensors")
    scores.write_counts(run, "shard-00001.tar", np.eye(4, dtype=int))
    assert str(STAGES["evaluate"].progress(config, index)) == "1/3 shards"


def test_another_runs_directory_is_refused(begun, tiny_config):
    config, index, run = begun
    configs.save(config, run / "config.yaml")
    config.seed = 9
    with pytest.raises(ConfigError, match="was made with another seed"):
        STAGES["train"].progress(config, index)


def test_a_login_node_need_not_load_torch():
    line = "import sys, weakclip.stages, launch.submit, launch.status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line]).returncode == 0
