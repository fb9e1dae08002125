from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.preloaded import Job

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
        done = Job(ranks, module, *arguments).wait()
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done

    return run


def metrics(run: Path, name: str = "loss/total") -> dict[int, float]:
    """Step -> value of one curve in a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


BUG = """
import os

if os.environ.get("WITH_A_BUG"):
    import numpy as np
    from weakclip import registry

    load = registry.load

    def broken(path):
        return load(path) if path != "weakclip.pseudo:run_part" else lambda config, part: np.zeros(2) + np.zeros(3)

    registry.load = broken
"""


@pytest.fixture
def with_a_bug(tmp_path) -> dict[str, str]:
    """Environment variables with which numpy raises a ValueError in the stage `pseudo`, in jobs as well."""
    (tmp_path / "bug").mkdir()
    (tmp_path / "bug" / "sitecustomize.py").write_text(BUG)  # which Python runs when it starts
    return {"WITH_A_BUG": "1", "PYTHONPATH": f"{REPO}:{tmp_path / 'bug'}"}
