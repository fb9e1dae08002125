from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}


def command(ranks: int, module: str, *arguments: object) -> list[str]:
    """The command line that starts `python -m module` on so many ranks; 0: without torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    return [sys.executable, *torchrun, "-m", module, *map(str, arguments)]


@pytest.fixture(scope="session")
def launch() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a module of the package on real ranks; a failure shows what it printed."""

    def run(ranks: int, module: str, *arguments: object, fails: bool = False) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command(ranks, module, *arguments), capture_output=True, text=True, env=ENVIRONMENT, cwd=REPO, timeout=600
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done

    return run


def metrics(run: Path, name: str = "loss/total") -> dict[int, float]:
    """Step -> value of one curve in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}
