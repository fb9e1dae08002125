"""A node failure during training: Slurm requeues the job on another node, where it resumes from its newest checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest

from tests.integration.conftest import metrics
from tests.integration.slurm_runs import losses
from tests.integration.test_local_cluster import processes_of
from weakclip.runtime.run_dir import RunDir

pytest_plugins = ["tests.integration.slurm_runs"]
pytestmark = pytest.mark.slurm


def kill_node(cluster, name: str) -> None:
    """SIGKILL of a node's slurmd, its steps and their tasks."""
    for pid, (line, variables) in processes_of(cluster).items():
        of_node = f"SLURMD_NODENAME={name}".encode() in variables or line.endswith(f"-N {name} ") or f"[{name}" in line
        if of_node or line.startswith("slurmstepd"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_training_on_a_dead_node_goes_on_from_its_checkpoint_on_another(
    make_cluster, submit, launch, recipe, tmp_path, monkeypatch
):
    two_nodes = make_cluster()
    two_nodes.start(nodes=2)
    monkeypatch.setenv("SLURM_CONF", str(two_nodes.conf))
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    launch(2, "weakclip.train", "--config", recipe, f"run={undisturbed}")
    job = submit("train", "--nodes", 1, "--gpus-per-node", 2)["train"]
    two_nodes.wait_until(lambda: len(RunDir(run).checkpoints()) == 2, job)
    assert "NodeList=127.0.0.1\n" in two_nodes.slurm("scontrol", "show", "job", job)
    kill_node(two_nodes, "127.0.0.1")
    reached = max(metrics(run))
    two_nodes.wait_until_completed(job)
    assert "NodeList=127.0.0.2\n" in two_nodes.slurm("scontrol", "show", "job", job)
    assert reached >= 10 and losses(run) == losses(undisturbed)
