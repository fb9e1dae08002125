"""One job at a time on a run, and the locks of dead processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from weakclip.runtime import lock
from weakclip.runtime.errors import UserError
from weakclip.runtime.lock import Holder
from weakclip.runtime.run_dir import RunDir

ELSEWHERE = Holder("another-node", 1, "1", "4711", "2026-01-01T00:00:00+00:00")


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path)


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


def held_by(run: RunDir, holder: Holder) -> None:
    run.lock.write_text(json.dumps(asdict(holder)))


def holder_of(process: subprocess.Popen[bytes], **changes: str | None) -> Holder:
    """What `process` would have written."""
    started = Path(f"/proc/{process.pid}/stat").read_text().split()[21]
    return replace(Holder(socket.gethostname(), process.pid, started, None, "2026-01-01T00:00:00+00:00"), **changes)


def taken_over(run: RunDir) -> bool:
    lock.check(run)
    lock.take(run)
    return Holder(**json.loads(run.lock.read_text())).pid == os.getpid()


# --------------------------------------------------------------------------------------------------------- this machine


def test_a_run_is_taken_and_given_back(run):
    lock.check(run)
    lock.take(run)
    assert Holder(**json.loads(run.lock.read_text())).lives()
    with pytest.raises(UserError, match=f"process {os.getpid()} on {socket.gethostname()} since"):
        lock.check(run)
    lock.release(run)
    assert not list(run.root.iterdir())
    lock.release(run)  # nothing to release
    assert taken_over(run)


def test_the_lock_says_which_job_of_slurms_holds_it(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    lock.take(run)
    with pytest.raises(UserError, match=f"is in use by job 17 on {socket.gethostname()} since"):
        lock.check(run)


def test_a_process_that_lives_keeps_its_run(run, sleeper):
    held_by(run, holder_of(sleeper))
    before = run.lock.read_bytes()
    for refused in (lock.check, lock.take):
        with pytest.raises(UserError, match=f"run: .* by process {sleeper.pid} on {socket.gethostname()} since 2026"):
            refused(run)
    lock.release(run)  # not ours
    assert run.lock.read_bytes() == before


def test_a_process_that_died_loses_its_run(run, sleeper):
    holder = holder_of(sleeper)
    sleeper.kill()
    sleeper.wait()
    held_by(run, holder)
    assert taken_over(run)


def test_a_process_that_died_loses_its_run_before_its_parent_has_asked_how(run, sleeper):
    held_by(run, holder_of(sleeper))
    sleeper.kill()
    while Path(f"/proc/{sleeper.pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    assert taken_over(run)


def test_another_process_of_the_same_number_is_not_taken_for_the_holder(run, sleeper):
    held_by(run, holder_of(sleeper, started="12"))
    assert taken_over(run)


@pytest.mark.parametrize(
    "text", ["", '{"host": "a', "[]", "3", '{"host": "a"}', '{"host": "a", "pid": 1, "colour": "red"}', "\0\0"]
)
def test_a_damaged_lock_is_none(run, text):
    run.lock.write_text(text)
    assert taken_over(run)


# ------------------------------------------------------------------------------------------------------- another machine


def test_without_a_job_nobody_can_know_and_the_message_says_what_to_do(run, squeue):
    squeue("exit 0")
    held_by(run, replace(ELSEWHERE, job=None))
    with pytest.raises(UserError, match=f"process 1 on another-node .*if it is dead, remove {run}/lock.json"):
        lock.take(run)


@pytest.mark.parametrize("state", ["RUNNING", "PENDING", "COMPLETING"])
def test_a_job_that_slurm_lists_keeps_its_run(run, squeue, state):
    squeue(f'case "$*" in *--jobs=4711*) echo {state};; esac')
    held_by(run, ELSEWHERE)
    with pytest.raises(UserError, match="job 4711 on another-node since"):
        lock.take(run)
    held_by(run, replace(ELSEWHERE, job="47"))  # which is not listed
    assert taken_over(run)


@pytest.mark.parametrize("answer", ["exit 0", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1"])
def test_a_job_that_slurm_does_not_list_loses_its_run(run, squeue, answer):
    squeue(answer)
    held_by(run, ELSEWHERE)
    assert taken_over(run)


@pytest.mark.parametrize("answer", [None, "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1"])
def test_a_job_keeps_its_run_while_slurm_cannot_be_asked(run, squeue, answer):
    if answer:
        squeue(answer)
    held_by(run, ELSEWHERE)
    with pytest.raises(UserError, match="job 4711 on another-node"):
        lock.take(run)


def test_a_job_that_begins_anew_on_another_node_takes_its_own_run(run, squeue, monkeypatch):
    squeue("echo RUNNING")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    held_by(run, ELSEWHERE)
    assert taken_over(run)


def test_a_lock_of_another_node_is_not_given_back(run):
    held_by(run, replace(ELSEWHERE, pid=os.getpid()))
    lock.release(run)
    assert run.lock.is_file()
