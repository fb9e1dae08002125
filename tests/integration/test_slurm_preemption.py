"""Preemption and time-out on a real Slurm: the run resumes at the next step, with the curves of an uninterrupted run."""

from __future__ import annotations

import random
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.integration.conftest import metrics
from tests.integration.slurm_runs import STEPS, losses

pytest_plugins = ["tests.integration.slurm_runs"]
pytestmark = pytest.mark.slurm


def step_of(run: Path) -> int:
    """How far a training is."""
    return max(metrics(run), default=0) if (run / "metrics.jsonl").exists() else 0


def restarts(cluster, job: str) -> int:
    return int(re.search(r"Restarts=(\d+)", cluster.slurm("scontrol", "show", "job", job))[1])


def ranks_of(job: str) -> list[psutil.Process]:
    """The tasks of a job's step, with their loader processes."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            variables = process.environ() if process.name().startswith("python") else {}
            if variables.get("SLURM_JOB_ID") == job and "SLURM_STEP_ID" in variables:
                found.append(process)
    return found


def steps_in_tensorboard(run: Path) -> list[int]:
    board = EventAccumulator(str(run / "tensorboard"), purge_orphaned_data=True)
    board.Reload()
    return [event.step for event in board.Scalars("loss/total")]


def test_a_preempted_training_goes_on_exactly(cluster, submit, reference, tmp_path):
    run = tmp_path / "run"
    job = submit("train", "--partition", "low")["train"]
    at = random.randint(3, STEPS - 15)
    cluster.wait_until(lambda: step_of(run) >= at, job)
    cluster.submit("sleep 1", "--partition=main", "--nodes=4", "--exclusive")
    cluster.wait_until_completed(job)
    assert restarts(cluster, job) >= 1, f"not preempted at step {at}"
    assert losses(run) == losses(reference)
    assert steps_in_tensorboard(run) == list(range(1, STEPS + 1))


def test_a_training_that_meets_its_time_limit_goes_on_exactly(cluster, submit, reference, tmp_path):
    """The ranks are stopped until Slurm has told them that their three minutes are nearly over: so it does so in mid-training."""
    run = tmp_path / "run"
    defaults = tmp_path / "defaults.yaml"
    defaults.write_text("{nodes: 2, gpus_per_node: 2, time: '3', signal_delay: 30, partition: main}")
    job = submit("train", "--defaults", defaults, "--time", "3")["train"]
    cluster.wait_until(lambda: step_of(run) >= 3, job)
    ranks = ranks_of(job)
    assert len(ranks) >= 4
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    began = min(rank.create_time() for rank in ranks)
    time.sleep(max(began + 157 - time.time(), 0))
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):  # of a loader process whose rank has continued already
            rank.send_signal(signal.SIGCONT)
    cluster.wait_until_completed(job)
    assert restarts(cluster, job) >= 1
    assert losses(run) == losses(reference)


def test_requeues_are_limited(cluster, submit, launch_tool, tmp_path):
    run = tmp_path / "run"
    job = submit("train", "--requeues", 0, "--nodes", 1, "train.steps=1000")["train"]
    cluster.wait_until(lambda: step_of(run) >= 1, job)
    cluster.slurm("scancel", "--signal=USR2", job)
    cluster.wait_until(lambda: cluster.state(job) == "FAILED", job)
    assert restarts(cluster, job) == 0 and "`requeues` are used up" in launch_tool("status", run).stdout
