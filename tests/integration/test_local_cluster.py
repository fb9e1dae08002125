"""slurm/local-cluster: the behaviour that the other tests of Slurm rely on."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from weakclip.runtime import rendezvous

pytest_plugins = ["tests.integration.slurm_cluster"]
pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def two_nodes(make_cluster):
    """A second cluster beside the shared one, to be harmed."""
    second = make_cluster()
    second.start(nodes=2)
    return second


def processes_of(cluster) -> dict[int, tuple[str, bytes]]:
    """Command line and variables of all processes that name the cluster's directory there."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line, variables = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
            if os.fsencode(cluster.D) in line + variables:
                found[int(folder.name)] = line.replace(b"\0", b" ").decode(), variables
    return found


@pytest.fixture(scope="module")
def job_of_a_dead_node(two_nodes):
    """A job that ran on the first node; its slurmd, step daemons and tasks were killed."""
    script = '[ "$SLURM_RESTART_COUNT" ] || sleep 600 & echo $SLURMD_NODENAME $SLURM_RESTART_COUNT; wait'
    job = two_nodes.submit(script)
    two_nodes.wait_until(lambda: two_nodes.printed(job), job)
    assert two_nodes.printed(job) == ["127.0.0.1"]
    kinds = {"daemon": [], "step": [], "task": []}
    for pid, (line, variables) in processes_of(two_nodes).items():
        if line.startswith("slurmd ") and line.endswith("-N 127.0.0.1 "):
            kinds["daemon"].append(pid)
        elif line.startswith("slurmstepd"):
            kinds["step"].append(pid)
        elif b"SLURMD_NODENAME=127.0.0.1" in variables:
            kinds["task"].append(pid)
    assert len(kinds["daemon"]) == 1 and all(kinds.values())
    for pid in [*kinds["daemon"], *kinds["step"], *kinds["task"]]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return job


def test_nodes_partitions_and_environment(cluster):
    assert cluster.tool("status").stdout.startswith(f"running in {cluster.D}")
    assert cluster.tool("status").returncode == 0
    assert os.environ["SLURM_CONF"] == str(cluster.conf)
    assert cluster.tool("env").stdout == f"export SLURM_CONF={cluster.conf}\n"
    again = cluster.tool("start")
    assert again.returncode == 0 and again.stdout == f"already running in {cluster.D}\n"
    rows = cluster.slurm("sinfo", "--noheader", "--format=%P %D %G").splitlines()
    assert sorted(rows) == ["low 4 gpu:fake:4", "main* 4 gpu:fake:4"]


def test_srun_runs_on_two_nodes(cluster):
    show = "echo $SLURMD_NODENAME $SLURM_PROCID $SLURM_NTASKS"
    rows = cluster.slurm("srun", "--nodes=2", "--ntasks-per-node=2", "bash", "-c", show)
    assert sorted(rows.splitlines()) == ["127.0.0.1 0 4", "127.0.0.1 1 4", "127.0.0.2 2 4", "127.0.0.2 3 4"]


def test_gpus_are_given_out(cluster):
    show = "echo $CUDA_VISIBLE_DEVICES; sleep 1"
    rows = cluster.slurm("srun", "--nodes=2", "--ntasks-per-node=1", "--gres=gpu:2", "bash", "-c", show)
    assert rows.splitlines() == ["0,1", "0,1"]
    with pytest.raises(AssertionError, match="Requested node configuration is not available"):
        cluster.slurm("srun", "--gres=gpu:5", "true")


def test_ranks_of_two_clusters_do_not_meet(cluster, two_nodes):
    step = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.[1-2]"}
    first, second = (rendezvous.variables(step | {"SLURM_JOB_ID": str(each.submit("true"))}) for each in (cluster, two_nodes))
    assert first["MASTER_PORT"] != second["MASTER_PORT"]


def test_array_of_four_reaches_the_accounts(cluster):
    job = cluster.submit("echo $SLURM_ARRAY_TASK_ID", "--array=0-3")
    cluster.wait_until(lambda: cluster.accounted(job) == ",".join(["COMPLETED"] * 4), job)
    assert [cluster.printed(f"{job}_{task}") for task in range(4)] == [["0"], ["1"], ["2"], ["3"]]


def test_a_hundred_tasks_go_through(cluster):
    job = cluster.submit("echo $SLURM_ARRAY_TASK_ID", "--array=0-99")
    cluster.wait_until_completed(job)
    assert [cluster.printed(f"{job}_{task}") for task in range(100)] == [[str(task)] for task in range(100)]


def test_dependents_of_a_failed_job_are_cancelled(cluster):
    failing = cluster.submit("sleep 1; exit 3")
    dependent = cluster.submit("true", f"--dependency=afterok:{failing}")
    last = cluster.submit("true", f"--dependency=afterok:{dependent}")
    cluster.wait_until(lambda: cluster.state(last) == "CANCELLED", failing, dependent, last)
    assert cluster.state(failing) == "FAILED" and cluster.state(dependent) == "CANCELLED"
    assert "Reason=DependencyNeverSatisfied" in cluster.slurm("scontrol", "show", "job", dependent)
    chain = failing, dependent, last
    expected = ["FAILED", "CANCELLED", "CANCELLED"]
    cluster.wait_until(lambda: [cluster.accounted(job).split(" ")[0] for job in chain] == expected, *chain)


# Slurm takes half a minute to notice a dead node, and as long to kill a preempted job, so both are tested at once.
@pytest.mark.usefixtures("job_of_a_dead_node")
def test_preemption_signals_every_rank_requeues_and_runs_again(cluster):
    rank = 'trap "echo USR2" USR2; echo run $SLURM_RESTART_COUNT; while [ -z "$SLURM_RESTART_COUNT" ]; do sleep 0.1; done'
    low = cluster.submit(f"srun bash -c '{rank}'", "--partition=low", "--nodes=4", "--exclusive", "--signal=USR2@60")
    cluster.wait_until(lambda: len(cluster.printed(low)) == 4, low)
    urgent = cluster.submit("true", "--partition=main", "--nodes=4", "--exclusive")
    cluster.wait_until_completed(low)
    lines = [line for line in cluster.printed(low) if line.startswith(("run", "USR2"))]
    assert lines == ["run"] * 4 + ["USR2"] * 4 + ["run 1"] * 4
    assert cluster.state(urgent) == "COMPLETED"


def test_a_dead_node_is_reported_its_job_moves_and_a_restart_repairs(two_nodes, job_of_a_dead_node):
    job = job_of_a_dead_node
    status = two_nodes.tool("status")
    assert status.returncode == 1 and status.stdout.startswith("half-dead")
    assert "  slurmd.127.0.0.1          not running\n" in status.stdout
    refused = two_nodes.tool("start")
    assert refused.returncode == 1 and "half-dead" in refused.stderr and len(refused.stderr.splitlines()) == 1
    two_nodes.wait_until_completed(job)
    assert two_nodes.printed(job) == ["127.0.0.1", "127.0.0.2 1"]
    two_nodes.tool("stop")
    two_nodes.start(nodes=2)
    assert two_nodes.tool("status").returncode == 0


def test_stop_leaves_no_process(two_nodes):
    running = two_nodes.submit("trap '' TERM; srun sleep 600 & sleep 600", "--nodes=2")
    waiting = two_nodes.submit("true", f"--dependency=afterok:{running}")
    two_nodes.wait_until(lambda: two_nodes.state(running) == "RUNNING", running)
    assert two_nodes.state(waiting) == "PENDING" and len(processes_of(two_nodes)) > 6
    assert two_nodes.tool("stop").stdout == f"stopped in {two_nodes.D}\n"
    assert processes_of(two_nodes) == {}
    assert two_nodes.tool("stop").stdout == f"not running in {two_nodes.D}\n"
    status = two_nodes.tool("status")
    assert status.returncode == 1 and status.stdout == f"stopped in {two_nodes.D}\n"
    assert "start it first" in two_nodes.tool("env").stderr


def test_a_missing_package_is_named(make_cluster, tmp_path):
    done = make_cluster().tool("start", PATH=str(tmp_path))
    assert done.returncode == 1 and "not installed: " in done.stderr and "slurm-wlm" in done.stderr
    assert len(done.stderr.splitlines()) == 1
