"""Measure training steps and masks on one GPU for at most eight minutes, and write one JSON.

    make bench-gpu                                    # runs/bench-gpu.json
    python benchmarks/gpu.py --device cpu             # a trial at small sizes, not a measurement

Steps are compared with the released order of work. Each measurement is a process of its own, so that memory is its own and a
failure costs only one line.
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
    "batch 32": ("step.py", "voc.yaml", "--batch", "32"),
    "batch 8": ("step.py", "voc.yaml", "--batch", "8"),
    "mask": ("mask.py", "voc.yaml"),
    "batch 32, tf32": ("step.py", "voc.yaml", "--batch", "32", "--tf32"),
    "batch 32, 81 classes": ("step.py", "coco.yaml", "--batch", "32"),
    "batch 8, lattice": ("step.py", "voc.yaml", "--batch", "8", "boundary.engine=lattice"),
    "batch 8, eager": ("step.py", "voc.yaml", "--batch", "8", "train.compile=off"),
}
"""Benchmark, recipe and options, the most important first."""
CLIP = "clip={model: null, pretrained: demo, image_size: 96}"
SMALL = {
    "step.py": ("--batch=2", CLIP, "augment.crop=96", "loss.grid=[24,24]", "boundary.engine=exact"),
    "mask.py": (CLIP, "data.scale=[128,96]", "pseudo.window=96", "pseudo.stride=64", "train.compile=on"),
}
"""Options of a trial on a CPU."""


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
    for name, (benchmark, recipe, *more) in MEASUREMENTS.items():
        left = end - time.monotonic()
        given = (
            ["--device", "cpu", "--rounds", "2", *more, *SMALL[benchmark]] if small else ["--rounds", str(options.rounds), *more]
        )
        line = [sys.executable, str(HERE / benchmark), "--config", str(RECIPES / recipe), *given]
        found[name] = measured(line, left, env) if left > 30 else {"failed": "no time was left"}
        print(f"{name}: {summary(found[name])}", flush=True)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {options.json}")


def measured(line: list[str], seconds: float, env: dict[str, str]) -> dict[str, Any]:
    """Return the figures of a benchmark, or the reason why there are none."""
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
    if "network_ms" in figures:
        times = ", ".join(f"{way} {ms} ms" for way, ms in figures["network_ms"].items())
        return f"{times}, CRF {figures['crf_ms']} ms, {figures['peak_gib']} GiB"
    return f"{figures['images_per_s']} images/s, {figures['peak_gib']} GiB, {figures['ratio']} times the released order of work"


if __name__ == "__main__":
    main()
