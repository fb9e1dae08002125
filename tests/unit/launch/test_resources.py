"""Resources of a job: defaults from a YAML, overriding options, and the parameters for Slurm."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from weakclip.config import ConfigError
from weakclip.launch.resources import Resources, add_options
from weakclip.stages import STAGES

CODE = ["export PYTHONPATH=code"]


def written(folder: Path, text: str) -> Path:
    (folder / "cluster.yaml").write_text(text)
    return folder / "cluster.yaml"


# ------------------------------------------------------------------------------------------------------------ who is heard


def test_a_stage_comes_before_the_file_and_the_command_line_before_both(tmp_path):
    file = written(
        tmp_path, "nodes: 2\nmem: 100GB\npartition: gpu\nstages: {train: {mem: 200GB, partition: big, time: 04:00:00}}\n"
    )
    given = {"partition": "asked", "nodes": None, "mem": None}
    defaults = Resources.read(file, given)
    assert (defaults.nodes, defaults.mem, defaults.partition, defaults.time) == (2, "100GB", "asked", "24:00:00")
    train = defaults.of(STAGES["train"], given)
    assert (train.nodes, train.mem, train.partition, train.time) == (2, "200GB", "asked", "04:00:00")
    assert defaults.of(STAGES["evaluate"], given).mem == "100GB"


def test_without_a_file_the_defaults_are_the_programs(tmp_path):
    assert Resources.read(None, {}) == Resources.read(written(tmp_path, ""), {}) == Resources()
    assert Resources.read(None, {"gpus_per_node": 0}).gpus_per_node == 0  # different from "not given"


def test_every_plain_field_is_an_option():
    parser = argparse.ArgumentParser()
    add_options(parser)
    asked = vars(parser.parse_args(["--nodes", "3", "--mem", "9GB", "--array-size", "5", "--container", "a.sif"]))
    assert Resources.read(None, asked) == Resources(nodes=3, mem="9GB", array_size=5, container="a.sif")
    assert asked.keys() == vars(Resources()).keys() - {"setup", "stages", "signal_delay"}


def test_the_repositorys_examples_are_read(repo):
    files = sorted((repo / "configs/cluster").glob("*.yaml"))
    assert "example.yaml" in [file.name for file in files]
    for file in files:
        defaults = Resources.read(file, {})
        assert all(defaults.of(stage, {}).slurm("job", CODE)["time"] > 0 for stage in STAGES.values())


# ---------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "text, message",
    [
        ("nodez: 2", "cluster.yaml: unknown key 'nodez'; the keys are nodes, gpus_per_node, .*, stages"),
        ("stages: {train: {nodez: 2}}", "stages.train: unknown key 'nodez'; the keys are nodes"),
        (
            "stages: {polish: {nodes: 2}}",
            "stages.polish: no such stage; the stages are shards, classify, cam, train, pseudo, retrain, test, evaluate",
        ),
        ("nodes: two", "cluster.yaml: Value 'two' .* could not be converted to Integer"),
        ("nodes: 0", "cluster.yaml: nodes must be 1 or more"),
        ("gpus_per_node: -1", "cluster.yaml: gpus_per_node must be 0 or more"),
        ("stages: {train: {array_size: 0}}", "stages.train: array_size must be 1 or more"),
        ("time: tomorrow", "cluster.yaml: time: 'tomorrow' is not a Slurm time such as 90, 12:00:00 or 2-00:00:00"),
        ("time: 2\nsignal_delay: 300", "cluster.yaml: time: 2 must exceed signal_delay, 300 seconds"),
        ("stages: {train: {time: 1}}", "stages.train: time: 1 must exceed signal_delay, 120 seconds"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Resources.read(written(tmp_path, text), {}).of(STAGES["train"], {})
    assert "\n" not in str(caught.value)


def test_a_mistake_in_an_option_is_named():
    with pytest.raises(ConfigError, match="command line: time: 'soon' is not a Slurm time"):
        Resources.read(None, {"time": "soon"})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="none.yaml: no such file; it should hold cluster defaults"):
        Resources.read(tmp_path / "none.yaml", {})


@pytest.mark.parametrize("text", ["nodes: [", "- nodes"])
def test_a_file_that_is_no_yaml_of_keys_is_named(tmp_path, text):
    with pytest.raises(ConfigError, match="cluster.yaml: "):
        Resources.read(written(tmp_path, text), {})


# -------------------------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize(
    "time, minutes",
    [
        ("90", 90),
        ("90:00", 90),
        ("90:30", 91),
        ("12:00:00", 720),
        ("00:59:01", 60),
        ("100:00:00", 6000),
        ("2-00", 2880),
        ("2-12:30", 3630),
        ("1-02:03:04", 1564),
        ("0-00:03:00", 3),
    ],
)
def test_times_are_read_as_slurm_reads_them(time, minutes):
    assert Resources(time=time).minutes == Resources(time=time).slurm("job", [])["time"] == minutes


@pytest.mark.parametrize("time", ["", "0", "00:00", "-5", "1:2:3:4", "12h", "1-", "1-2-3", "1.5", " 90", "UNLIMITED"])
def test_other_times_are_refused(time):
    with pytest.raises(ConfigError, match="time: .* is not a Slurm time"):
        Resources(time=time)


@pytest.mark.parametrize(
    "time, minutes",
    [
        ("04:00:00", 240),
        ("1-00:00:00", 1440),
        ("'12:00:00'", 720),
        ("12:00:00", 720),
        ("90:30", 91),
    ],
)
def test_times_in_a_file_need_no_quotes(tmp_path, time, minutes):
    assert Resources.read(written(tmp_path, f"time: {time}"), {}).minutes == minutes
    train = Resources.read(written(tmp_path, f"stages: {{train: {{time: {time}}}}}"), {}).of(STAGES["train"], {})
    assert train.minutes == minutes


def test_a_job_cannot_be_warned_before_it_begins():
    assert Resources(time="3", signal_delay=179)
    with pytest.raises(ConfigError, match="time: 3 must exceed signal_delay, 180 seconds"):
        Resources(time="3", signal_delay=180)


# ------------------------------------------------------------------------------------------------------------------ stages


@pytest.mark.parametrize(
    "stage, nodes, gpus, ranks",
    [("train", 4, 8, 8), ("pseudo", 1, 1, 1), ("evaluate", 1, 0, 1)],
    ids=["ranks that work together", "tasks of an array", "tasks that have no use for a GPU"],
)
def test_a_stage_gets_what_it_can_use(stage, nodes, gpus, ranks):
    found = Resources(nodes=4, gpus_per_node=8, cpus_per_task=6).of(STAGES[stage], {"nodes": 4})
    assert (found.nodes, found.gpus_per_node, found.ranks_per_node, found.cpus_per_task) == (nodes, gpus, ranks, 6)


@pytest.mark.parametrize("stage", STAGES)
def test_no_gpu_is_one_rank_a_node_for_every_stage(stage):
    found = Resources(nodes=2, gpus_per_node=0).of(STAGES[stage], {})
    assert (found.gpus_per_node, found.ranks_per_node) == (0, 1)


# ------------------------------------------------------------------------------------------------------------ for submitit


def test_slurm_is_asked_for_what_was_given_and_nothing_else():
    asked = Resources(nodes=2, gpus_per_node=4, cpus_per_task=6, mem="9GB", time="90", account="us", setup=["module load cuda"])
    assert asked.slurm("name", CODE) == {
        "job_name": "name",
        "nodes": 2,
        "ntasks_per_node": 4,
        "gpus_per_node": 4,
        "cpus_per_task": 6,
        "mem": "9GB",
        "account": "us",
        "time": 90,
        "signal_delay_s": 120,
        "array_parallelism": 16,
        "srun_args": ["--cpus-per-task=6", "--kill-on-bad-exit=1"],
        "setup": ["module load cuda", *CODE],
        "additional_parameters": {"requeue": True},
    }


def test_a_job_that_waits_ends_with_the_one_it_waits_for():
    asked = Resources().slurm("name", CODE, "afterok:3")
    assert asked["dependency"] == "afterok:3"
    assert asked["additional_parameters"] == {"requeue": True, "kill-on-invalid-dep": "yes"}


def test_without_gpus_none_are_asked_for():
    asked = Resources(gpus_per_node=0).slurm("name", CODE)
    assert asked["ntasks_per_node"] == 1 and "gpus_per_node" not in asked


def test_srun_starts_an_image_of_pyxis_with_this_directory_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = "docker://nvcr.io#nvidia/pytorch:25.01-py3"
    assert Resources(container=image).slurm("name", CODE)["srun_args"][2:] == [
        f"--container-image={image}",
        f"--container-mounts={tmp_path}:{tmp_path}",
        f"--container-workdir={tmp_path}",
    ]


def test_an_image_of_apptainer_is_none_of_sruns_business():
    assert Resources(container="image.sif").slurm("name", CODE) == Resources().slurm("name", CODE)


def test_a_machine_without_slurm_runs_what_fits_on_it():
    found = Resources(gpus_per_node=1, time="90").of(STAGES["evaluate"], {}).local()
    assert found == {"tasks_per_node": 1, "gpus_per_node": 0, "timeout_min": 90, "signal_delay_s": 120}


def test_a_machine_without_slurm_is_one_node_and_starts_no_container():
    with pytest.raises(ConfigError, match="nodes: 2, but there is only this machine without Slurm"):
        Resources(nodes=2).local()
    with pytest.raises(ConfigError, match="container: only Slurm starts containers; run this command inside it instead"):
        Resources(container="image.sif").local()
