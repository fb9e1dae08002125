"""launch/submit.py where there is no Slurm: the same stages, on this machine, one after the other."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.integration.conftest import ENVIRONMENT, REPO
from weakclip.runtime.run_dir import checkpoints


@pytest.fixture
def submit(tiny_recipe, make_shards, tmp_path):
    """Runs launch/submit.py on this machine, for the tiny recipe and the run tmp_path/run."""
    shards = make_shards(tmp_path / "set", count=5, per_shard=2)

    def run(stage: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        recipe = ("--config", str(tiny_recipe), f"run={tmp_path / 'run'}", f"data.train={shards.root}", "train.steps=4")
        line = [sys.executable, "launch/submit.py", "--stage", stage, "--cluster", "local", *recipe, *arguments]
        return subprocess.run(line, env=ENVIRONMENT, cwd=REPO, capture_output=True, text=True, timeout=300)

    return run


def test_all_stages_run_and_a_second_time_are_skipped(submit, tmp_path):
    done = submit("all", "--array-size", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    assert [path.name for path in checkpoints(run)] == ["step-4.safetensors"]
    assert len(list((run / "pseudo").glob("*.png"))) == 5
    assert json.loads((run / "scores-masks.json").read_text())["miou"] >= 0
    assert "step 4/4" in done.stderr  # what the training says is shown
    again = submit("all")
    assert again.returncode == 0 and again.stdout.count("skipped") == 3
    more = submit("all", "train.steps=5")
    assert "error: pseudo: 5/5 images are there of an earlier train; remove them" in more.stderr
    assert [path.name for path in checkpoints(run)] == ["step-4.safetensors"]


def test_a_stage_that_fails_says_why_and_is_not_followed_by_the_next(submit, tmp_path):
    done = submit("all", "clip.pretrained=weights/nowhere.pt")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: train failed: ")]
    assert done.returncode == 1 and len(errors) == 1 and "weights/nowhere.pt" in errors[0]
    assert not (tmp_path / "run" / "pseudo").exists()
