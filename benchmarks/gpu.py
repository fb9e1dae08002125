"""Measure training steps on one GPU for at most eight minutes, against the released order of work, and write one JSON.

    make bench-gpu                                    # runs/bench-gpu.json
    python benchmarks/gpu.py --device cpu             # a trial at small sizes, not a measurement

Each measurement is a process of its own, so that memory is its own and a failure costs only one line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
RECIPES = HERE.parent / "configs"
SECONDS = 480
MEASUREMENTS = {
    "batch 32": ("voc.yaml", "--batch", "32"),
    "batch 8": ("voc.yaml", "--batch", "8"),
    "batch 32, tf32": ("voc.yaml", "--batch", "32", "--tf32"),
    "batch 32, 81 classes": ("coco.yaml", "--batch", "32"),
    "batch 8, lattice": ("voc.yaml", "--batch", "8", "boundary.engine=lattice"),
    "batch 8, eager": ("voc.yaml", "--batch", "8", "train.compile=off"),
}
"""Recipe and options of benchmarks/step.py, the most important first."""
SMALL = ("clip={model: null, pretrained: demo, image_size: 96}", "augment.crop=96", "loss.grid=[24,24]", "boundary.engine=exact")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, default=Path("runs/bench-gpu.json"))
    options = parser.parse_args()
    small = options.device == "cpu"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""} if small else dict(os.environ)
    end = time.monotonic() + SECONDS
    found: dict[str, Any] = {}
    for name, (recipe, *more) in MEASUREMENTS.items():
        left = end - time.monotonic()
        rounds = 2 if small else options.rounds
        given = ["--batch", "2", "--device", "cpu", *more[2:], *SMALL] if small else more
        step = [sys.executable, str(HERE / "step.py"), "--config", str(RECIPES / recipe)]
        line = [*step, "--rounds", str(rounds), *given]
        found[name] = measured(line, left, env) if left > 30 else {"failed": "no time was left"}
        print(f"{name}: {summary(found[name])}", flush=True)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {options.json}")


def measured(line: list[str], seconds: float, env: dict[str, str]) -> dict[str, Any]:
    """Return the figures of a run of benchmarks/step.py, or the reason why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "figures.json")
        try:
            done = subprocess.run([*line, "--json", str(out)], capture_output=True, text=True, timeout=seconds, env=env)
        except subprocess.TimeoutExpired:
            return {"failed": f"not within {seconds:.0f} s"}
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        return json.loads(out.read_text())


def summary(figures: dict[str, Any]) -> str:
    if "failed" in figures:
        return f"failed: {figures['failed']}"
    return f"{figures['images_per_s']} images/s, {figures['peak_gib']} GiB, {figures['ratio']} times the released order of work"


if __name__ == "__main__":
    main()
