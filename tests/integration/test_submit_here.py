"""launch/submit.py without Slurm: the same stages, on this machine, one after the other."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import ENVIRONMENT, REPO
from weakclip.runtime.run_dir import RunDir


@pytest.fixture(scope="module")
def submit(tiny_recipe, make_shards, tmp_path_factory):
    """Runs launch/submit.py with all stages on this machine, for the tiny recipe and a run in a folder."""
    shards = make_shards(tmp_path_factory.mktemp("shards") / "set", count=5, per_shard=2)

    def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        recipe = ("--config", str(tiny_recipe), f"run={folder}", f"data.train={shards.root}", "train.steps=4")
        line = [sys.executable, "launch/submit.py", "--stage", "all", "--cluster", "local", *recipe, *arguments]
        return subprocess.run(line, env=ENVIRONMENT | variables, cwd=REPO, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="module")
def finished(submit, tmp_path_factory):
    """A run of all stages, and what the submission printed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    return run, submit(run, "--array-size", "2")


def test_all_stages_run_and_a_second_time_are_skipped(submit, finished):
    run, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in RunDir(run).checkpoints()] == ["step-4.safetensors"]
    assert len(list((run / "pseudo").glob("*.png"))) == 5
    assert json.loads((run / "scores-masks.json").read_text())["miou"] >= 0
    assert "step 4/4" in done.stderr  # the training's log is shown
    miou = json.loads((run / "scores-masks.json").read_text())["miou"]
    assert done.stdout.splitlines()[-4:] == [
        f"train     weights           {run}/weights/last.safetensors",
        f"pseudo    masks             {run}/pseudo",
        f"evaluate  scores            {run}/scores-masks.json, mIoU {miou:.1f} %",
        f"          curves            tensorboard --logdir {run}/tensorboard",
    ]
    again = submit(run)
    assert again.returncode == 0 and again.stdout.count("skipped") == 3
    more = submit(run, "train.steps=5")
    assert "was started with other settings (train.steps: 4 -> 5); keep those of" in more.stderr
    assert [path.name for path in RunDir(run).checkpoints()] == ["step-4.safetensors"]


def test_a_stage_that_fails_says_why_and_is_not_followed_by_the_next(submit, tmp_path):
    done = submit(tmp_path / "run", "clip.pretrained=weights/nowhere.pt")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: train failed: ")]
    assert done.returncode == 1 and len(errors) == 1 and "weights/nowhere.pt" in errors[0]
    assert not (tmp_path / "run" / "pseudo").exists()


def test_a_bug_keeps_its_traceback_in_the_terminal_and_in_the_log(submit, finished, with_a_bug, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("pseudo", "scores-*", "jobs"))
    done = submit(run, **with_a_bug)
    logs = "".join(path.read_text() for path in (run / "jobs/1-pseudo").glob("*_log.err"))
    for text in (done.stderr, logs):
        assert "Traceback (most recent call last)" in text and "ValueError: operands could not be broadcast" in text
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and error.startswith("error: pseudo failed: ValueError: operands could not be broadcast")
