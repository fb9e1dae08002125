"""Stages as a chain of jobs on a real Slurm: results, what is run again, and the effects of a failure."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.integration.conftest import ENVIRONMENT
from tests.integration.slurm_runs import STEPS, losses, masks

pytest_plugins = ["tests.integration.slurm_runs"]
pytestmark = pytest.mark.slurm

RETRAIN = (
    "retrain.network=segformer", "retrain.backbone=b0", "retrain.augment.crop=96", "retrain.train.steps=2",
    "retrain.train.batch=1", "retrain.train.pictures=0", "retrain.train.validate_images=4", "retrain.test.scales=[1.0]",
    "retrain.test.flip=false", "retrain.test.crf=null", "train.validate_images=4",
)  # fmt: skip


@pytest.fixture
def trained(reference, tmp_path):
    """A run that is trained and has no masks yet."""
    return shutil.copytree(reference, tmp_path / "run", ignore=shutil.ignore_patterns("pseudo", "scores-*", "jobs", "lock.json"))


def test_the_chain_gives_what_the_same_run_gives_without_slurm(cluster, submit, launch_tool, recipe, reference, tmp_path):
    built = tmp_path / "built"
    made_alone = recipe.parent / "train"
    defaults = tmp_path / "defaults.yaml"
    defaults.write_text("{nodes: 2, gpus_per_node: 2, time: '60', array_size: 2, stages: {retrain: {nodes: 1}}}")
    jobs = submit("all", "--defaults", defaults, f"data.train={built}", f"data.val={made_alone}", *RETRAIN)
    assert list(jobs) == ["shards", "train", "pseudo", "retrain", "test", "evaluate"]
    for job in jobs.values():
        cluster.wait_until_completed(job)
    run = tmp_path / "run"
    assert all((built / path.name).read_bytes() == path.read_bytes() for path in made_alone.glob("*.tar"))
    assert losses(run) == losses(reference)
    assert len(masks(run)) == 24 and masks(run) == masks(reference)
    assert json.loads((run / "scores-masks.json").read_text()) == json.loads((reference / "scores-masks.json").read_text())
    retrained = run / "retrain" / "segformer"
    assert len(list((retrained / "masks-val").glob("*.png"))) == 24
    assert 0 <= json.loads((retrained / "scores-val.json").read_text())["miou"] <= 100
    again = launch_tool("submit", "--stage", "all", "--config", run / "config.yaml")
    assert [line.split(":")[0] for line in again.stdout.splitlines() if "skipped" in line] == list(jobs)
    shown = launch_tool("status", run).stdout
    assert (
        shown.count("COMPLETED") == 6
        and f"{STEPS}/{STEPS} steps" in shown
        and "2/2 steps" in shown
        and "24/24 images" in shown
        and shown.count("6/6 shards") == 3
    )


def test_after_scancel_of_one_task_only_its_images_are_made(cluster, submit, trained):
    array = ("--array-size", 2, "--array-parallelism", 1)
    first = submit("pseudo", *array)["pseudo"]
    cluster.wait_until(lambda: "RUNNING" in cluster.state(f"{first}_0"), first)
    cluster.slurm("scancel", f"{first}_0")
    cluster.wait_until(lambda: cluster.state(f"{first}_1") == "COMPLETED", first)
    made = {path: path.stat().st_mtime_ns for path in (trained / "pseudo").glob("*.png")}
    assert 0 < len(made) < 24
    second = submit("pseudo", *array)["pseudo"]
    cluster.wait_until_completed(second)
    assert len(masks(trained)) == 24
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())


def test_a_failed_stage_ends_its_dependents_and_status_says_why(cluster, submit, launch_tool, tmp_path):
    jobs = submit("all", "--nodes", 1, "--gpus-per-node", 0, "clip.pretrained=weights/nowhere.pt")
    cluster.wait_until(lambda: "PENDING" not in cluster.state(jobs["evaluate"]), *jobs.values())
    shown = {line.split()[0]: line for line in launch_tool("status", tmp_path / "run").stdout.splitlines()[2:]}
    assert "FAILED" in shown["train"] and "error: " in shown["train"] and "weights/nowhere.pt" in shown["train"]
    assert "CANCELLED: train failed" in shown["pseudo"]
    log = logged(tmp_path / "run", "train")
    assert len([line for line in log.splitlines() if line.startswith("error: ")]) == 1 and "Traceback" not in log


def test_a_bug_leaves_its_traceback_in_the_jobs_log(cluster, submit, trained, with_a_bug, monkeypatch):
    for name, value in with_a_bug.items():
        monkeypatch.setitem(ENVIRONMENT, name, value)
    job = submit("pseudo", "--array-size", 1)["pseudo"]
    cluster.wait_until(lambda: "FAILED" in cluster.state(job), job)
    log = logged(trained, "pseudo")
    assert "Traceback (most recent call last)" in log and "ValueError: operands could not be broadcast" in log


def logged(run, stage):
    """What the jobs of a stage wrote to stderr."""
    return "".join(path.read_text() for path in (run / "jobs").glob(f"*-{stage}/*_log.err"))


def test_a_job_that_waits_or_works_keeps_others_from_its_run(cluster, submit, launch_tool, recipe, tmp_path):
    blocker = cluster.submit("sleep 300")
    job = submit("train", "--dependency", f"afterok:{blocker}")["train"]
    refused = launch_tool("submit", "--stage", "train", "--config", recipe, f"run={tmp_path / 'run'}", fails=True)
    assert f"has job {job} (train); wait" in refused.stderr and f"scancel {job}" in refused.stderr
    cluster.slurm("scancel", blocker, job)


def jobs_of(cluster):
    """Numbers of all jobs that there are and were."""
    return sorted(cluster.slurm("squeue", "--noheader", "--states=all", "--format=%A").split())


@pytest.mark.parametrize(
    "options, said",
    [
        (("--partition", "moon"), "invalid partition specified: moon"),
        (("--gpus-per-node", "9"), "Requested node configuration is not available"),
        (("--dependency", "afterok:4242424"), "Slurm knows no job 4242424"),
        (("--time", "tomorrow"), "'tomorrow' is not a Slurm time"),
    ],
    ids=str,
)
def test_what_slurm_would_reject_is_said_before_anything_is_submitted(cluster, launch_tool, recipe, tmp_path, options, said):
    before = jobs_of(cluster)
    done = launch_tool("submit", "--stage", "all", "--config", recipe, f"run={tmp_path / 'run'}", *options, fails=True)
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
    assert jobs_of(cluster) == before and not (tmp_path / "run").exists()
