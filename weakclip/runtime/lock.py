"""A lock, RUN/lock.json, that lets one job at a time work on a run. The lock of a dead job is detected and taken over."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from weakclip.runtime.atomic import write_whole
from weakclip.runtime.errors import UserError
from weakclip.runtime.run_dir import RunDir


@dataclass(frozen=True)
class Holder:
    """The process that works on a run. job: id of its Slurm job, if any. started: its start time, in ticks since boot."""

    host: str
    pid: int
    started: str | None
    job: str | None
    since: str

    @classmethod
    def here(cls) -> Holder:
        """Return this process."""
        pid = os.getpid()
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(socket.gethostname(), pid, _started(pid), os.environ.get("SLURM_JOB_ID"), now)

    def __str__(self) -> str:
        return f"{f'job {self.job}' if self.job else f'process {self.pid}'} on {self.host} since {self.since}"

    def lives(self) -> bool:
        """Return whether the process still runs; True also where that cannot be told from here."""
        if self.host == socket.gethostname():
            return _started(self.pid) == self.started is not None
        if self.job is None:
            return True
        return self.job != os.environ.get("SLURM_JOB_ID") and job_lives(self.job)


def job_lives(job: str) -> bool:
    """Return whether Slurm has the job pending or running; True where Slurm cannot be asked."""
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return True
    if asked.returncode:
        return "Invalid job id" not in asked.stderr
    return bool(asked.stdout.strip())


def check(run: RunDir) -> None:
    """Raise UserError when a process that still runs holds `run`."""
    if (found := holder(run)) is not None:
        raise UserError(f"run: {run} is in use by {found}; wait for it or stop it (if it is dead, remove {run.lock})")


def holder(run: RunDir) -> Holder | None:
    """Return the process that holds `run`, if it still runs."""
    found = _read(run)
    return found if found is not None and found.lives() else None


def take(run: RunDir) -> None:
    """Take the lock of `run` for this process. Raises UserError when another process holds it."""
    directory = os.open(run.root, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)  # processes that find the lock of the same dead job take turns
        check(run)
        write_whole(run.lock, json.dumps(asdict(Holder.here())) + "\n")
    finally:
        os.close(directory)


def release(run: RunDir) -> None:
    """Release the lock of `run`, if this process holds it."""
    if (found := _read(run)) is not None and (found.host, found.pid) == (socket.gethostname(), os.getpid()):
        run.lock.unlink()


def _read(run: RunDir) -> Holder | None:
    """Return the holder that the lock names; None for a missing or damaged lock, as of a job that was killed while writing it."""
    try:
        return Holder(**json.loads(run.lock.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _started(pid: int) -> str | None:
    """Return when a process started, in the kernel's ticks since boot: this tells it from a later process with the same id.

    Return None for a process that has ended, even if its parent has not reaped it yet.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
