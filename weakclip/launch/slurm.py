"""Slurm's commands: whether it answers, whether it accepts a script, and the states of jobs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from weakclip.config import ConfigError


class SlurmTask(NamedTuple):
    """A job, or one task of an array, as Slurm sees it."""

    job: str
    """Job id; that of the array, for a task."""
    state: str
    reason: str


def answers() -> bool:
    """Return whether this machine belongs to a Slurm cluster that is up."""
    return shutil.which("sbatch") is not None and _run(["scontrol", "ping"]).returncode == 0


def check(script: str) -> None:
    """Raise ConfigError with Slurm's message when it would reject a batch script, and where there is no Slurm."""
    if shutil.which("sbatch") is None:
        raise ConfigError("--cluster slurm: this machine has no sbatch; submit from a login node, or use --cluster local")
    asked = _run(["sbatch", "--test-only"], script)
    if asked.returncode:
        said = " ".join(asked.stderr.replace("sbatch: error:", "").replace("allocation failure:", "").split())
        raise ConfigError(f"Slurm rejects it: {said}")


def check_dependency(dependency: str) -> None:
    """Raise ConfigError for a dependency on an unknown job: Slurm would start at once."""
    for job in re.findall(r"(?<=[:,?])\d+", dependency):
        if not tasks([job]):
            raise ConfigError(f"--dependency {dependency}: Slurm knows no job {job}")


def tasks(jobs: Iterable[str]) -> list[SlurmTask]:
    """Return the known tasks of these jobs, from Slurm's accounting and, where it is more recent, its queue."""
    listed = ",".join(jobs)
    if not listed:
        return []
    found: dict[str, SlurmTask] = {}
    accounts = _run(["sacct", "-X", "--array", "--noheader", "--parsable2", f"--jobs={listed}", "--format=JobID,State,Reason"])
    queue = _run(["squeue", "--states=all", "--array", "--noheader", f"--jobs={listed}", "--format=%i|%T|%r"])
    for line in (accounts.stdout + queue.stdout).splitlines():
        name, state, reason = line.split("|", 2)
        found[name] = SlurmTask(name.split("_")[0], state.split()[0], "" if reason == "None" else reason)
    return list(found.values())


@contextmanager
def outside_any_job() -> Iterator[None]:
    """Hide the variables of the current job, so that a job submitted from within it does not inherit them."""
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
