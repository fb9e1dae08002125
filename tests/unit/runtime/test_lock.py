"""One job at a time on a run, and the locks of those that died."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from weakclip.config import ConfigError
from weakclip.runtime import lock
from weakclip.runtime.lock import Holder

ELSEWHERE = Holder("another-node", 1, "1", "4711", "2026-01-01T00:00:00+00:00")


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """`squeue(line)`: a program of that name, alone on PATH, that does what the shell line says."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()

    def write(line: str) -> None:
        (tmp_path / "bin/squeue").write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin/squeue").chmod(0o755)

    return write


@pytest.fixture
def sleeper():
    """Another process, which lives until the test is over."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def held_by(run: Path, holder: Holder) -> None:
    (run / "lock.json").write_text(json.dumps(asdict(holder)))


def holder_of(process: subprocess.Popen[bytes], **changes: str | None) -> Holder:
    """What `process` would have written."""
    started = Path(f"/proc/{process.pid}/stat").read_text().split()[21]
    return replace(Holder(socket.gethostname(), process.pid, started, None, "2026-01-01T00:00:00+00:00"), **changes)


def taken_over(run: Path) -> bool:
    lock.check(run)
    lock.take(run)
    return Holder(**json.loads((run / "lock.json").read_text())).pid == os.getpid()


# --------------------------------------------------------------------------------------------------------- this machine


def test_a_run_is_taken_and_given_back(tmp_path):
    lock.check(tmp_path)
    lock.take(tmp_path)
    assert Holder(**json.loads((tmp_path / "lock.json").read_text())).lives()
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on {socket.gethostname()} since"):
        lock.check(tmp_path)
    lock.release(tmp_path)
    assert not list(tmp_path.iterdir())
    lock.release(tmp_path)  # nothing to give back
    assert taken_over(tmp_path)


def test_the_lock_says_which_job_of_slurms_holds_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    lock.take(tmp_path)
    with pytest.raises(ConfigError, match=f"is being worked on by job 17 on {socket.gethostname()} since"):
        lock.check(tmp_path)


def test_a_process_that_lives_keeps_its_run(tmp_path, sleeper):
    held_by(tmp_path, holder_of(sleeper))
    before = (tmp_path / "lock.json").read_bytes()
    for refused in (lock.check, lock.take):
        with pytest.raises(ConfigError, match=f"run: .* by process {sleeper.pid} on {socket.gethostname()} since 2026"):
            refused(tmp_path)
    lock.release(tmp_path)  # not ours
    assert (tmp_path / "lock.json").read_bytes() == before


def test_a_process_that_died_loses_its_run(tmp_path, sleeper):
    holder = holder_of(sleeper)
    sleeper.kill()
    sleeper.wait()
    held_by(tmp_path, holder)
    assert taken_over(tmp_path)


def test_a_process_that_died_loses_its_run_before_its_parent_has_asked_how(tmp_path, sleeper):
    held_by(tmp_path, holder_of(sleeper))
    sleeper.kill()
    while Path(f"/proc/{sleeper.pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    assert taken_over(tmp_path)


def test_another_process_of_the_same_number_is_not_taken_for_the_holder(tmp_path, sleeper):
    held_by(tmp_path, holder_of(sleeper, started="12"))
    assert taken_over(tmp_path)


@pytest.mark.parametrize(
    "text", ["", '{"host": "a', "[]", "3", '{"host": "a"}', '{"host": "a", "pid": 1, "colour": "red"}', "\0\0"]
)
def test_a_damaged_lock_is_none(tmp_path, text):
    (tmp_path / "lock.json").write_text(text)
    assert taken_over(tmp_path)


# ------------------------------------------------------------------------------------------------------- another machine


def test_without_a_job_nobody_can_know_and_the_message_says_what_to_do(tmp_path, squeue):
    squeue("exit 0")
    held_by(tmp_path, replace(ELSEWHERE, job=None))
    with pytest.raises(ConfigError, match=f"process 1 on another-node .*if it is dead, remove {tmp_path}/lock.json"):
        lock.take(tmp_path)


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "COMPLETING"])
def test_a_job_that_slurm_lists_keeps_its_run(tmp_path, squeue, state):
    squeue(f'case "$*" in *--jobs=4711*) echo {state};; esac')
    held_by(tmp_path, ELSEWHERE)
    with pytest.raises(ConfigError, match="job 4711 on another-node since"):
        lock.take(tmp_path)
    held_by(tmp_path, replace(ELSEWHERE, job="47"))  # which is not listed
    assert taken_over(tmp_path)


@pytest.mark.parametrize("answer", ["exit 0", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1"])
def test_a_job_that_slurm_does_not_list_loses_its_run(tmp_path, squeue, answer):
    squeue(answer)
    held_by(tmp_path, ELSEWHERE)
    assert taken_over(tmp_path)


@pytest.mark.parametrize("answer", [None, "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1"])
def test_a_job_keeps_its_run_while_slurm_cannot_be_asked(tmp_path, squeue, answer):
    if answer:
        squeue(answer)
    held_by(tmp_path, ELSEWHERE)
    with pytest.raises(ConfigError, match="job 4711 on another-node"):
        lock.take(tmp_path)


def test_a_job_that_begins_anew_on_another_node_takes_its_own_run(tmp_path, squeue, monkeypatch):
    squeue("echo RUNNING")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    held_by(tmp_path, ELSEWHERE)
    assert taken_over(tmp_path)


def test_a_lock_of_another_node_is_not_given_back(tmp_path):
    held_by(tmp_path, replace(ELSEWHERE, pid=os.getpid()))
    lock.release(tmp_path)
    assert (tmp_path / "lock.json").is_file()
