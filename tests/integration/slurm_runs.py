"""Runs on the demo world for the tests of Slurm: `pytest_plugins = ["tests.integration.slurm_runs"]`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from tests.integration.conftest import ENVIRONMENT, REPO
from weakclip.datasets import build
from weakclip.demo import world
from weakclip.labels import class_names
from weakclip.recipe import load

pytest_plugins = ["tests.integration.slurm_cluster"]

STEPS = 24
RECIPE = """
run: {folder}/run
classes: demo
data:
  train: {folder}/train
  build: {{source: folder, images: "{folder}/images", labels: "{folder}/labels.csv", mask_dir: "{folder}/masks",
           cams: "{folder}/cams", cam_keys: class, samples_per_shard: 4, processes: 1}}
  scale: [384, 96]
  workers: 1
  shuffle_window: 2
seeds: {{background: 0.15, foreground: 0.4}}
augment: {{crop: 96, photometric: false}}
clip: {{model: null, pretrained: demo, image_size: 96}}
matching: {{width: 32}}
decoder: {{fpn_channels: 16, head_channels: 16}}
loss: {{grid: [24, 24]}}
optim: {{lr: 1.0e-3, warmup: 3}}
train: {{steps: {steps}, batch: 2, deepspeed: configs/deepspeed/zero2.json, log_every: 1, checkpoint_every: 5}}
pseudo: {{scales: [1.0], flip: false, window: 96, stride: 64, crf: null}}
"""


def draw(folder: Path, count: int) -> None:
    """Pictures of the demo world with labels, masks, and their masks at a quarter of the size for CAMs."""
    for name in ("images", "masks", "cams"):
        (folder / name).mkdir(parents=True)
    rows = ["file,labels"]
    for number in range(count):
        drawn, key = world.picture(0, number), f"train_{number:05d}"
        Image.fromarray(drawn.image).save(folder / "images" / f"{key}.jpg", quality=95)
        Image.fromarray(drawn.mask).save(folder / "masks" / f"{key}.png")
        small = [Image.fromarray(255 * (drawn.mask == each).astype(np.uint8)).resize((48, 48)) for each in drawn.classes]
        np.savez(folder / "cams" / f"{key}.npz", keys=drawn.classes, cam=np.stack([np.asarray(map_hw) for map_hw in small]))
        rows.append(f"{key}.jpg,{';'.join(class_names('demo')[each] for each in drawn.classes)}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


def losses(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl that have losses: step and losses."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name == "step" or "loss/" in name} for line in lines if "loss/total" in line]


def masks(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "pseudo").glob("*.png")}


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of the demo world: 24 pictures in 6 shards; its steps on 4 ranks take a quarter of a minute."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "world"  # once for all of pytest's processes
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            draw(folder, count=24)
            (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, steps=STEPS))
            build.plan_of(load(folder / "recipe.yaml")).run()
    return folder / "recipe.yaml"


@pytest.fixture(scope="session")
def reference(launch, recipe: Path) -> Path:
    """What that recipe gives without Slurm, on 4 ranks."""
    run = recipe.parent / "run"
    with FileLock(f"{run}.lock"):
        for ranks, module in ((4, "train"), (0, "pseudo"), (0, "evaluate")):
            if not (run / "scores-masks.json").exists():
                launch(ranks, f"weakclip.{module}", "--config", recipe)
    return run


@pytest.fixture
def launch_tool() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs launch/submit.py or launch/status.py."""

    def run(name: str, *arguments: object, fails: bool = False) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, str(REPO / "launch" / f"{name}.py"), *map(str, arguments)]
        # SLURM_CONF may have been set after ENVIRONMENT was made.
        done = subprocess.run(line, env=os.environ | ENVIRONMENT, cwd=REPO, capture_output=True, text=True, timeout=300)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def submit(launch_tool, recipe: Path, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Submits stages of the recipe, on two nodes of two ranks, as the run tmp_path/run; returns the job of each."""

    def run(stage: str, *arguments: object) -> dict[str, str]:
        defaults = ("--defaults", REPO / "configs" / "cluster" / "local-cluster.yaml", "--cpus-per-task", 1)
        done = launch_tool("submit", "--stage", stage, "--config", recipe, f"run={tmp_path / 'run'}", *defaults, *arguments)
        return dict(re.findall(r"^(\w+) +job (\d+)", done.stdout, re.MULTILINE))

    return run
