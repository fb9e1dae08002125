"""A real Slurm for tests: put `pytest_plugins = ["tests.integration.slurm_cluster"]` into a module, then use `cluster`.

All modules of a pytest worker share one cluster. Tests that damage it, or need another one, use `make_cluster`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import skip_or_fail

PATIENCE = 900  # seconds
FAILURES = {"FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY"}
TOOL = Path(__file__).resolve().parents[2] / "slurm" / "local-cluster"


class LocalCluster:
    """A cluster in a directory of its own, and Slurm's commands on it."""

    def __init__(self) -> None:
        # In the system's temporary directory, since the length of a socket's path is limited and pytest's paths are long.
        self.D = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.conf = self.D / "slurm.conf"

    def tool(self, command: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """slurm/local-cluster."""
        line = [sys.executable, str(TOOL), command, "--dir", str(self.D), *options]
        return subprocess.run(line, env=os.environ | environment, capture_output=True, text=True, timeout=180)

    def start(self, nodes: int = 4) -> None:
        """Start it. Where its programs aren't installed the test is skipped, or fails if Slurm is required."""
        done = self.tool("start", "--nodes", str(nodes))
        if "not installed:" in done.stderr:
            skip_or_fail("slurm", done.stderr.strip())
        assert done.returncode == 0, done.stdout + done.stderr

    def remove(self) -> None:
        self.tool("stop")
        shutil.rmtree(self.D)

    def slurm(self, *command: object, seconds: float = 60) -> str:
        """What one of Slurm's commands prints."""
        line, environment = [str(word) for word in command], os.environ | {"SLURM_CONF": str(self.conf)}
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: str, *options: str) -> int:
        """The id of a new job of a bash script; it prints into JOB.out, or JOB_TASK.out, of the cluster's directory."""
        named = f"--output={self.D}/%{'A_%a' if any(option.startswith('--array') for option in options) else 'j'}.out"
        return int(self.slurm("sbatch", "--parsable", "--open-mode=append", named, *options, "--wrap", script))

    def printed(self, job: object) -> list[str]:
        file = self.D / f"{job}.out"
        return file.read_text().splitlines() if file.exists() else []

    def state(self, job: object) -> str:
        """Of a job, as slurmctld knows it: the states of an array's tasks joined by commas."""
        return ",".join(self.slurm("squeue", "--noheader", "--states=all", "--array", f"--jobs={job}", "--format=%T").split())

    def accounted(self, job: object) -> str:
        """The same, as sacct says. It comes some seconds later."""
        return ",".join(self.slurm("sacct", "--noheader", "-X", "--parsable2", f"--jobs={job}", "--format=State").splitlines())

    def wait_until(self, condition: Callable[[], object], *jobs: object) -> None:
        """Waits; when it takes longer than any machine would, the test fails and shows these jobs."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end:
                pytest.fail("\n".join([f"not within {PATIENCE} s", *map(self.shown, jobs)]))
            time.sleep(0.2)

    def wait_until_completed(self, job: object) -> None:
        """Waits for all tasks of a job; the test fails at once, and shows the job, when one ended otherwise."""
        self.wait_until(lambda: set(self.state(job).split(",")) <= {"COMPLETED", *FAILURES}, job)
        if set(self.state(job).split(",")) != {"COMPLETED"}:
            pytest.fail(f"{self.state(job)}\n{self.shown(job)}")

    def shown(self, job: object) -> str:
        """What Slurm knows of a job and did with it, and the ends of the files that it printed into."""
        known = self.slurm("scontrol", "show", "job", job)
        log = [line for line in (self.D / "log" / "slurmctld.log").read_text().splitlines() if f"JobId={job}" in line]
        files = [Path(name) for name in sorted(set(re.findall(r"Std(?:Err|Out)=(\S+)", known)))]
        ends = [f"{file}:\n{file.read_text(errors='replace')[-4000:]}" for file in files if file.exists()]
        return "\n".join([known, *log, *ends])


@pytest.fixture(scope="session")
def make_cluster() -> Iterator[Callable[[], LocalCluster]]:
    """Makes clusters that aren't started yet, and ends them with the session."""
    made = []

    def make() -> LocalCluster:
        made.append(LocalCluster())
        return made[-1]

    yield make
    for one in made:
        one.remove()


@pytest.fixture(scope="session")
def cluster(make_cluster: Callable[[], LocalCluster]) -> Iterator[LocalCluster]:
    """Four nodes, and SLURM_CONF set to them from here to the session's end."""
    shared = make_cluster()
    shared.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(shared.conf))
        yield shared
