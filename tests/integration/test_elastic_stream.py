"""The stream on real processes: any number of ranks and workers, killed and resumed, draws the same keys and pixels."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.integration.preloaded import Job

STEPS, BATCH = 20, 4


@pytest.fixture(scope="module")
def recipe(tiny_recipe, make_shards, tmp_path_factory) -> tuple[str, ...]:
    """Two mixed sets of uneven shards, with every augmentation."""
    folder = tmp_path_factory.mktemp("sets")
    first = make_shards(folder / "first", count=23, per_shard=5, H=150, W=200)
    second = make_shards(folder / "second", count=7, per_shard=3, H=90, W=70)
    return ("--config", str(tiny_recipe), f"data.train={first.root}", f"data.mix={{{second.root}: 0.5}}")


def arguments(recipe: tuple[str, ...], folder: Path, ranks: int, workers: int, done: int = 0, steps: int = STEPS) -> tuple:
    folder.mkdir(exist_ok=True)
    return folder, done * BATCH, steps, *recipe, f"train.batch={BATCH // max(ranks, 1)}", f"data.workers={workers}"


def drawn(folder: Path, steps: range) -> list[list]:
    """The global batch of each step: the ranks' samples in their order."""
    lines = [path.read_text().splitlines(keepends=True) for path in sorted(folder.glob("rank-*.jsonl"))]
    by_rank = [dict(json.loads(line) for line in of_rank if line.endswith("\n")) for of_rank in lines]
    return [[sample for of_rank in by_rank for sample in of_rank[step]] for step in steps]


@pytest.fixture(scope="module")
def alone(launch, recipe, tmp_path_factory) -> list[list]:
    """One process that loads for itself."""
    folder = tmp_path_factory.mktemp("alone")
    launch(0, "tests.integration.log_stream", *arguments(recipe, folder, 0, 0))
    return drawn(folder, range(STEPS))


def test_two_ranks_of_two_workers_draw_the_keys_and_pixels_of_one_process(launch, recipe, alone, tmp_path):
    launch(2, "tests.integration.log_stream", *arguments(recipe, tmp_path, 2, 2))
    assert len(alone) == STEPS and len({key for batch in alone for key, _ in batch}) > 10
    assert drawn(tmp_path, range(STEPS)) == alone


@pytest.mark.parametrize("before, after", [((2, 2), (0, 0)), ((0, 0), (2, 2))])
def test_killed_and_resumed_on_the_other_world_it_draws_the_same(launch, recipe, alone, tmp_path, before, after):
    """(ranks, workers) before and after a SIGKILL."""
    ranks, workers = before
    job = Job(ranks, "tests.integration.log_stream", *arguments(recipe, tmp_path / "before", ranks, workers, steps=100_000))
    while job.running() and complete(tmp_path / "before", ranks) < 5:
        time.sleep(0.005)
    job.kill()
    assert job.wait().returncode == -signal.SIGKILL, "it ended before it could be killed"
    done = min(complete(tmp_path / "before", ranks), STEPS // 2)
    ranks, workers = after
    launch(ranks, "tests.integration.log_stream", *arguments(recipe, tmp_path / "after", ranks, workers, done))
    assert drawn(tmp_path / "before", range(done)) + drawn(tmp_path / "after", range(done, STEPS)) == alone


def complete(folder: Path, ranks: int) -> int:
    """Steps that every rank has noted whole."""
    texts = [path.read_text() for path in folder.glob("rank-*.jsonl")]
    return min((text.count("\n") for text in texts), default=0) if len(texts) == max(ranks, 1) else 0
