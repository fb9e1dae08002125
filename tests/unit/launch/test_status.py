"""launch/status.py: the state of jobs, from the journal, their logs, and Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from weakclip import cli
from weakclip.cams import make
from weakclip.data.index import Index
from weakclip.datasets.writing import open_for_writing
from weakclip.launch import journal, logs, status
from weakclip.launch.journal import Submission
from weakclip.recipe import save
from weakclip.runtime import lock
from weakclip.runtime.run_dir import RunDir

IMAGES = 7


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_shards) -> Path:
    return make_shards(tmp_path_factory.mktemp("status") / "set", count=IMAGES, per_shard=3, H=8, W=8).root


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def note(run, tiny_config, shards):
    """`note("train", "12", tasks=None, after=[])`: as if submitted; returns the job's folder."""

    def submitted(stage: str, job: str, tasks: int | None = None, after: tuple[str, ...] = (), cluster: str = "slurm") -> Path:
        folder = journal.next_folder(RunDir(run), stage)
        folder.mkdir(parents=True)
        config = tiny_config(f"data.train={shards}", "retrain.network=segformer", "retrain.train.steps=20")
        save(config, folder / "config.yaml")
        journal.add(RunDir(run), Submission.of(stage, job, tasks, cluster, folder, list(after)))
        return folder

    return submitted


@pytest.fixture(autouse=True)
def slurm(tmp_path, monkeypatch):
    """`slurm(sacct=[...], squeue=[...])`: programs of these names that print these lines."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def answers(sacct: list[str], squeue: list[str]) -> None:
        for name, lines in (("sacct", sacct), ("squeue", squeue)):
            (tmp_path / "bin" / name).write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
            (tmp_path / "bin" / name).chmod(0o755)

    answers([], [])
    return answers


def rows(run: Path) -> dict[str, dict[str, str]]:
    """The table by stage and column."""
    table = status.table(run)
    return {str(row[0]): {name: str(cell) for name, cell in zip(table.header, row, strict=True)} for row in table.rows}


def masks_made(run: Path, times: list[int]) -> None:
    """Masks that were finished at these times, in the order in which the directory lists them."""
    (run / "pseudo").mkdir()
    for number in range(len(times)):
        (run / f"pseudo/image_{number}.png").touch()
    for path, time in zip((run / "pseudo").glob("*.png"), times, strict=True):
        os.utime(path, (time, time))


def says(folder: Path, name: str, text: str, time: int = 1000) -> None:
    (folder / name).write_text(text)
    os.utime(folder / name, (time, time))


# --------------------------------------------------------------------------------------------------------------- the table


def test_a_run_without_jobs_is_one_clear_line(run, capsys):
    with pytest.raises(SystemExit, match="1"):
        cli.run(status.main, [str(run)])
    message = "holds no training, and no job was submitted for it; pass the value of `run`, or start it: weakclip submit"
    assert capsys.readouterr().err == f"error: {run}: {message}\n"


def test_the_table_is_printed(run, note, slurm, capsys):
    says(note("train", "12"), "12_0_log.out", "step 3\n")
    slurm(["12|RUNNING|None"], [])
    status.main([str(run)])
    title, header, line = capsys.readouterr().out.splitlines()
    assert title == str(run)
    assert header.split() == ["stage", "job", "state", "progress", "left", "last", "line"]
    assert line.split() == ["train", "12", "RUNNING", "0/20", "steps", "step", "3"]


def test_an_array_is_counted_by_state_and_the_queue_knows_more_than_the_accounts(run, note, slurm):
    says(note("pseudo", "12", tasks=4), "12_1_0_log.err", "image_4\n")
    slurm(
        ["12_0|COMPLETED|None", "12_1|RUNNING|None", "12_2|PENDING|None", "12_3|PENDING|None", "120_0|FAILED|None"],
        ["12_1|RUNNING|None", "12_2|RUNNING|None", "12_3|PENDING|JobArrayTaskLimit"],
    )
    masks_made(run, [100, 110, 120])
    assert rows(run)["pseudo"] == {
        "stage": "pseudo",
        "job": "12",
        "state": "1 COMPLETED, 2 RUNNING, 1 PENDING",
        "progress": "3/7 images",
        "left": "0:00:40",
        "last line": "image_4",
    }


def test_the_time_left_does_not_depend_on_the_order_in_which_files_are_listed(run, note):
    note("pseudo", "12", tasks=4)
    masks_made(run, [120, 110, 100])
    assert rows(run)["pseudo"]["left"] == "0:00:40"


def test_a_failed_stage_says_why_and_those_that_waited_for_it_say_so(run, note, slurm):
    train = note("train", "12")
    note("pseudo", "13", tasks=2, after=("12",))
    says(train, "12_0_log.out", "step 3\n", time=3000)
    says(train, "12_1_log.err", "error: image_3.png: unreadable\nsrun: task 1: Exited with exit code 1\n", time=2000)
    slurm(["12|FAILED|NonZeroExitCode", "13_0|CANCELLED by 0|Dependency", "13_1|CANCELLED by 0|Dependency"], [])
    found = rows(run)
    assert (found["train"]["state"], found["train"]["last line"]) == ("FAILED", "error: image_3.png: unreadable")
    assert (found["pseudo"]["state"], found["pseudo"]["last line"]) == ("2 CANCELLED: train failed", "")


def test_the_end_of_a_chain_names_the_stage_that_failed(run, note, slurm):
    note("train", "12")
    note("pseudo", "13", after=("12",))
    note("evaluate", "14", after=("13",))
    slurm(["12|FAILED|NonZeroExitCode", "13|CANCELLED by 0|Dependency", "14|CANCELLED by 0|Dependency"], [])
    assert rows(run)["evaluate"]["state"] == "CANCELLED: train failed"


def test_a_job_that_somebody_cancelled_blames_no_other(run, note, slurm):
    note("train", "12")
    note("pseudo", "13", after=("12",))
    slurm(["12|COMPLETED|None", "13|CANCELLED by 1000|None"], [])
    assert rows(run)["pseudo"]["state"] == "CANCELLED"


def test_the_newest_job_of_a_stage_counts(run, note, slurm):
    says(note("train", "12"), "12_0_log.err", "error: old\n")
    says(note("train", "15"), "15_0_log.err", "new\n")
    slurm(["12|FAILED|None", "15|RUNNING|None"], [])
    found = rows(run)["train"]
    assert (found["job"], found["state"], found["last line"]) == ("15", "RUNNING", "new")


@pytest.mark.parametrize("stage, folder", [("train", "."), ("retrain", "retrain/segformer")])
def test_a_training_is_as_far_as_its_metrics(run, note, stage, folder):
    note(stage, "12")
    lines = [{"time": 1000.0 + step, "step": step, "lr": 1e-4} for step in (5, 10, 15)] + [
        {"time": 1016.0, "step": 15, "miou": 9}
    ]
    (run / folder).mkdir(parents=True, exist_ok=True)
    (run / folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"time": 1016')
    found = rows(run)[stage]
    assert (found["progress"], found["left"]) == ("15/20 steps", "0:00:05")


LINE = {"loss/seeding": 1.5, "loss/total": 2.25, "lr": 1e-4, "images_per_second": 12.0}


def trained(config, folder: Path, steps: int) -> None:
    """A training that was started directly and has done these steps, one a second."""
    folder.mkdir(parents=True, exist_ok=True)
    save(config, folder / "config.yaml")
    lines = [{"step": 0, "time": 1000.0, "parameters/trainable": 1}]
    lines += [{"step": step, "time": 1000.0 + step, **LINE} for step in range(1, steps + 1)]
    lines += [{"step": steps, "time": 1001.0 + steps, "validation/miou": 40.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_training_without_a_job_is_as_far_as_its_metrics(run, tiny_config):
    trained(tiny_config(), run, steps=15)
    assert rows(run)["train"] == {
        "stage": "train",
        "job": "-",
        "state": "STOPPED",
        "progress": "15/20 steps",
        "left": "0:00:05",
        "last line": "seeding 1.500 total 2.250  lr 1.0e-04  12.0 images/s",
    }
    lock.take(RunDir(run))
    assert rows(run)["train"]["state"] == "RUNNING" and f"process {os.getpid()} on " in rows(run)["train"]["job"]
    lock.release(RunDir(run))
    trained(tiny_config(), run, steps=20)
    assert (rows(run)["train"]["state"], rows(run)["train"]["left"]) == ("COMPLETED", "")


def test_a_training_that_has_not_logged_yet_is_at_its_beginning(run, tiny_config):
    run.mkdir()
    save(tiny_config(), run / "config.yaml")
    assert (rows(run)["train"]["progress"], rows(run)["train"]["last line"]) == ("0/20 steps", "")


def test_trainings_without_a_job_stand_beside_the_jobs_of_other_stages(run, note, tiny_config):
    trained(tiny_config("retrain.network=segformer", "retrain.train.steps=8"), run / "retrain/segformer", steps=4)
    trained(tiny_config(), run, steps=20)
    note("pseudo", "12", tasks=2)
    found = rows(run)
    assert list(found) == ["train", "pseudo", "retrain"]
    assert (found["retrain"]["progress"], found["pseudo"]["job"]) == ("4/8 steps", "12")


def test_stages_stand_in_the_order_of_the_chain(run, note):
    for stage in ("evaluate", "pseudo", "train"):
        note(stage, "12")
    assert list(rows(run)) == ["train", "pseudo", "evaluate"]


def test_cams_in_the_making_are_counted_by_shards(run, note, tiny_config, shards, tmp_path):
    folder = note("cam", "12", tasks=2)
    options = (f"data.train={tmp_path}/cams", f"data.labelled={shards}")
    config = tiny_config(*options)
    save(config, folder / "config.yaml")
    assert rows(run)["cam"]["progress"] == "0/3 shards"
    open_for_writing(tmp_path / "cams", {**make.provenance(config, Index.load(shards)), "shards": 3})
    for number, time in enumerate((1000, 1010)):
        written = tmp_path / f"cams.partial/shard-0000{number}.json"
        written.touch()
        os.utime(written, (time, time))
    assert (rows(run)["cam"]["progress"], rows(run)["cam"]["left"]) == ("2/3 shards", "0:00:10")


def test_a_job_that_slurm_has_forgotten_is_unknown(run, note):
    note("train", "12")
    assert rows(run)["train"]["state"] == "UNKNOWN"


def test_products_of_another_config_are_said_in_their_place(run, note, tiny_config):
    note("train", "12")
    save(tiny_config("seed=3"), run / "config.yaml")
    assert rows(run)["train"]["progress"].startswith(f"? (run: {run} was started with other settings (seed: 3 -> 0, data.train: ")


def test_processes_of_this_machine_are_seen_without_slurm(run, note):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    note("train", str(ended.pid), cluster="local")
    folder = note("pseudo", f"{ended.pid},{os.getpid()}", tasks=2, cluster="local")
    says(folder, f"{os.getpid()}_0_log.err", "image_4\n")
    found = rows(run)
    assert (found["train"]["state"], found["pseudo"]["state"]) == ("ENDED", "1 ENDED, 1 RUNNING")
    assert found["pseudo"]["last line"] == "image_4"


# -------------------------------------------------------------------------------------------------------------- last lines


def test_the_newest_line_is_that_of_the_log_written_to_last(tmp_path):
    says(tmp_path, "12_0_log.out", "new\n", time=2000)
    says(tmp_path, "12_1_log.out", "old\n", time=1000)
    says(tmp_path, "12_0_log.err", "", time=3000)
    says(tmp_path, "123_0_log.out", "of another job\n", time=3000)
    assert logs.last_line(tmp_path, "12") == "new"
    assert logs.last_line(tmp_path, "7") == ""


@pytest.mark.parametrize(
    "text, last",
    [
        ("loading\n\n  \n", "loading"),
        ("train:  10%\rtrain:  20%\rtrain:  30%", "train:  30%"),
        ("step 3\nsubmitit INFO (2026-01-01 00:00:00,000) - Job completed successfully\n", "step 3"),
        ("error: disk full\nsubmitit ERROR - Submitted job triggered an exception\nsrun: error: task 0\n", "error: disk full"),
        ("error: of long ago\n" + "step\n" * 30, "step"),
        ("x" * 30_000 + "\nend\n", "end"),
        ("step 3\nim Bild \udce4\n", "im Bild \ufffd"),
        ("submitit INFO - Starting\n", ""),
    ],
    ids=["blank", "progress bar", "submitit's", "error", "old error", "long", "no UTF-8", "none"],
)
def test_the_last_line_says_what_matters(tmp_path, text, last):
    (tmp_path / "12_0_log.err").write_bytes(text.encode(errors="surrogateescape"))
    assert logs.last_line(tmp_path, "12") == last


def test_submitits_own_lines_are_not_the_reason_of_a_failure(tmp_path):
    (tmp_path / "7_0_log.err").write_text("Traceback\nValueError: shapes\n")
    (tmp_path / "7_0_log.out").write_text("submitit INFO (now) - Starting\nsubmitit ERROR (now) - Submitted job triggered it\n")
    assert logs.last_line(tmp_path, "7") == "ValueError: shapes"
