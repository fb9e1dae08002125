"""One job at a time on a run directory: RUN/lock.json says which. The lock of a job that died is recognised and taken over."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from weakclip.config import ConfigError
from weakclip.runtime.atomic import write_whole


@dataclass(frozen=True)
class Holder:
    """The process that works on a run. job: Slurm's number, if it is one of Slurm's. started: when the kernel began it."""

    host: str
    pid: int
    started: str | None
    job: str | None
    since: str

    @classmethod
    def here(cls) -> Holder:
        pid = os.getpid()
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(socket.gethostname(), pid, _started(pid), os.environ.get("SLURM_JOB_ID"), now)

    def __str__(self) -> str:
        return f"{f'job {self.job}' if self.job else f'process {self.pid}'} on {self.host} since {self.since}"

    def lives(self) -> bool:
        """Whether it still runs, or may do so for all that can be known from here."""
        if self.host == socket.gethostname():
            return _started(self.pid) == self.started is not None
        if self.job is None:
            return True
        return self.job != os.environ.get("SLURM_JOB_ID") and job_lives(self.job)


def job_lives(job: str) -> bool:
    """Whether Slurm has the job waiting or running; True where Slurm cannot be asked."""
    try:
        asked = subprocess.run(
            ["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return True
    if asked.returncode:
        return "Invalid job id" not in asked.stderr
    return bool(asked.stdout.strip())


def check(run: Path) -> None:
    """Raises ConfigError when a process that lives works on `run`."""
    if (found := _read(run)) is not None and found.lives():
        raise ConfigError(f"run: {run} is being worked on by {found}; wait or stop it (if it is dead, remove {_path(run)})")


def take(run: Path) -> None:
    """Make this process the one that works on `run`. Raises ConfigError when another one does."""
    directory = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)  # two who find the lock of the same dead job take turns
        check(run)
        write_whole(_path(run), json.dumps(asdict(Holder.here())) + "\n")
    finally:
        os.close(directory)


def release(run: Path) -> None:
    """Give the run back, if this process has it."""
    if (found := _read(run)) is not None and (found.host, found.pid) == (socket.gethostname(), os.getpid()):
        _path(run).unlink()


def _path(run: Path) -> Path:
    return run / "lock.json"


def _read(run: Path) -> Holder | None:
    """What the lock says; a damaged one, of a job that was killed as it wrote it, says nothing."""
    try:
        return Holder(**json.loads(_path(run).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks since boot, so that another one of the same number isn't taken for it.

    None for one that has ended, be it that its parent hasn't heard of it yet.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]
