"""slurm/*.sbatch, which work without submitit, on a real Slurm."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import REPO
from weakclip.data.index import Index

pytest_plugins = ["tests.integration.slurm_cluster"]
pytestmark = pytest.mark.slurm

TWO_RANKS = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
STEPS = 30


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train", count=11, per_shard=4)


@pytest.fixture(scope="module")
def sbatch(cluster, tiny_recipe, shards):
    """Submits a script from the repository, in this Python's environment; returns the job's number."""

    def submit(script, options, run, *overrides):
        named = "%A_%a" if any(option.startswith("--array") for option in options) else "%j"
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(REPO)
            patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
            line = ["sbatch", "--parsable", f"--output={cluster.D}/{named}.out", *options, f"slurm/{script}"]
            return int(cluster.slurm(*line, tiny_recipe, f"run={run}", f"data.train={shards.root}", *overrides))

    return submit


@pytest.fixture(scope="module")
def trained(cluster, sbatch, tmp_path_factory):
    """A run on two nodes that was told to stop in the middle, as before a time limit, and its job."""
    run = tmp_path_factory.mktemp("trained") / "run"
    steps = (f"train.steps={STEPS}", "train.log_every=1", "train.checkpoint_every=3", "data.workers=1")
    job = sbatch("train.sbatch", TWO_RANKS, run, *steps)
    cluster.wait_until(lambda: (run / "checkpoints" / "step-3.safetensors").exists(), job)
    cluster.slurm("scancel", "--batch", "--signal=USR2", job)
    cluster.wait_until(lambda: cluster.state(job) in ("COMPLETED", "FAILED", "CANCELLED"), job)
    return run, job


def test_a_training_that_is_told_to_stop_saves_is_requeued_and_goes_on_to_the_end(cluster, trained):
    run, job = trained
    said = "\n".join(cluster.printed(job))
    assert cluster.state(job) == "COMPLETED", said
    assert said.count("SIGUSR2: saved at step") == 1
    assert "Restarts=1 " in cluster.slurm("scontrol", "show", "job", job)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/total" in line] == list(range(1, STEPS + 1))
    assert (run / "weights" / "last.safetensors").is_file()


def test_an_array_makes_all_masks_each_task_its_own(cluster, sbatch, trained, shards):
    run, _ = trained
    job = sbatch("pseudo_array.sbatch", ("--array=0-1", "--gpus-per-node=0", "--cpus-per-task=1"), run)
    cluster.wait_until(lambda: set(cluster.state(job).split(",")) <= {"COMPLETED", "FAILED"}, job)
    said = ["\n".join(cluster.printed(f"{job}_{task}")) for task in (0, 1)]
    assert cluster.state(job) == "COMPLETED,COMPLETED", said
    assert [text.splitlines()[0] for text in said] == ["shards 0:1 of 3", "shards 1:3 of 3"]
    assert sorted(path.stem for path in (run / "pseudo").glob("*.png")) == sorted(e.key for e in Index.load(shards.root).entries)


def test_a_mistake_is_said_and_not_repeated(cluster, sbatch, tmp_path):
    training = sbatch("train.sbatch", TWO_RANKS, tmp_path / "run", "train.stps=3")
    masks = sbatch("pseudo_array.sbatch", ("--array=1-2", "--gpus-per-node=0", "--cpus-per-task=1"), tmp_path / "run")
    cluster.wait_until(lambda: {cluster.state(training), cluster.state(masks)} == {"FAILED", "FAILED,FAILED"}, training, masks)
    assert "the nearest is 'train.steps'" in cluster.printed(training)[0]
    assert cluster.printed(f"{masks}_1") == ["error: submit it with --array=0-N; the tasks share the shards evenly"]
