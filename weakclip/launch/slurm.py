"""Slurm's commands: does it answer, would it take a script, how are the jobs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from weakclip.config import ConfigError


class Task(NamedTuple):
    """A job, or one task of an array, as Slurm sees it."""

    job: str
    """The array's number, for a task."""
    state: str
    reason: str


def answers() -> bool:
    """Whether this machine belongs to a Slurm that is up."""
    return shutil.which("sbatch") is not None and _run(["scontrol", "ping"]).returncode == 0


def check(script: str) -> None:
    """Raises ConfigError with Slurm's own words when it would not take a batch script."""
    asked = _run(["sbatch", "--test-only"], script)
    if asked.returncode:
        said = " ".join(asked.stderr.replace("sbatch: error:", "").replace("allocation failure:", "").split())
        raise ConfigError(f"Slurm rejects it: {said}")


def check_dependency(dependency: str) -> None:
    """Raises ConfigError when a job that is to be waited for is not known: Slurm would start at once."""
    for job in re.findall(r"(?<=[:,?])\d+", dependency):
        if not tasks([job]):
            raise ConfigError(f"--dependency {dependency}: Slurm knows no job {job}")


def tasks(jobs: Iterable[str]) -> list[Task]:
    """Those of all these jobs that Slurm knows, from its accounts and, where that is fresher, its queue."""
    listed = ",".join(jobs)
    if not listed:
        return []
    found: dict[str, Task] = {}
    accounts = _run(["sacct", "-X", "--array", "--noheader", "--parsable2", f"--jobs={listed}", "--format=JobID,State,Reason"])
    queue = _run(["squeue", "--states=all", "--array", "--noheader", f"--jobs={listed}", "--format=%i|%T|%r"])
    for line in (accounts.stdout + queue.stdout).splitlines():
        name, state, reason = line.split("|", 2)
        found[name] = Task(name.split("_")[0], state.split()[0], "" if reason == "None" else reason)
    return list(found.values())


@contextmanager
def outside_any_job() -> Iterator[None]:
    """Submitting from within a job must not hand that job's variables to the new one."""
    inherited = {
        name: value for name, value in os.environ.items() if name.startswith(("SLURM_", "SLURMD_")) and name != "SLURM_CONF"
    }
    for name in inherited:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(inherited)


def _run(command: Sequence[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
