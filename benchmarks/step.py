"""Compare a training step with the released code's order of work, on the same machine, alternating.

    python benchmarks/step.py --config configs/voc.yaml --device cuda --batch 8 --rounds 20 --json step.json

Both have the same shapes, random weights and random images. Ours is `Engine.train_step`, with DeepSpeed and the recipe's
settings; the other is in released_order.py.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from released_order import Part, ReleasedOrder
from torch import Tensor

from weakclip import cli, labels
from weakclip.config import Config
from weakclip.data.stream import Batch
from weakclip.models.precision import autocast
from weakclip.models.weakclip import Output, WeakCLIP
from weakclip.runtime.command_line import output_file
from weakclip.training import flops, jobs
from weakclip.training.engine import Engine
from weakclip.training.world import World


class Clock:
    """Time by part. It waits for the device around each part, so it is used in rounds of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, list[float]]()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        wait_for(self.device)
        start = time.perf_counter()
        yield
        wait_for(self.device)
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)

    def medians_ms(self) -> dict[str, float]:
        return {name: round(1e3 * statistics.median(found), 2) for name, found in self.seconds.items()}


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Ours:
    """The training step of the recipe."""

    def __init__(self, config: Config, world: World) -> None:
        self.engine = Engine(WeakCLIP(config, labels.class_names(config.classes)), jobs.refine(config), world)
        self.device = world.device

    def step(self, batch: Batch) -> None:
        self.engine.train_step([batch])

    def parts(self, batch: Batch, part: Part) -> None:
        """Do a step on the engine's module part by part."""
        model = self.engine.plain.train()
        with part("distortion"):
            targets = self.engine.targets(batch)
        output = forward_in_parts(model, targets.images_B3HW, part)
        with part("losses with CRF"):
            total = torch.stack(list(model.losses(output, targets).values())).sum()
        with part("backward"):
            total.backward()
        model.zero_grad()
        model.eval()


def forward_in_parts(model: WeakCLIP, images_B3HW: Tensor, part: Part) -> Output:
    """Run WeakCLIP.forward part by part."""
    with autocast(model.precision, images_B3HW.device):
        with part("vision tower"):
            features = model.clip.vision(images_B3HW, drop_path=True)
        with part("text tower"):
            text_KE = model.encode_names()
        with part("matching"):
            scores_BKhw = model.matching(text_KE, features.global_BE, features.visual_BEhw)
        with part("adapter and neck"):
            levels = model.decoder.neck(model.adapter(features.taps), scores_BKhw)
        with part("head"):
            logits_BKhw = model.decoder.head(levels)
    return Output(logits_BKhw, scores_BKhw[:, : model.num_classes])


def random_batch(config: Config, batch: int, device: torch.device) -> Batch:
    """Return a batch of noise with square seeds, on the device."""
    generator, crop = torch.Generator().manual_seed(0), config.augment.crop
    classes = len(labels.class_names(config.classes))
    images = torch.randint(0, 256, (batch, crop, crop, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    cells = torch.randint(0, classes, (batch, 1, 8, 8), generator=generator).float()
    seeds = F.interpolate(cells, size=(crop, crop))[:, 0].byte()
    seeds[:, : crop // 4] = labels.IGNORE
    found = Batch([], images, seeds, torch.ones(batch, classes, dtype=torch.uint8), torch.zeros(batch, 5), [])
    return Batch(*(part.to(device) if isinstance(part, Tensor) else part for part in found))


def measure(config: Config, device: torch.device, rounds: int, only: str | None = None) -> dict[str, Any]:
    """Return the times of both, measured in alternation; only: "ours" or "released"."""
    batch = random_batch(config, config.train.batch, device)
    made: dict[str, Callable[[], Any]] = {
        "ours": lambda: Ours(config, World.join()),
        "released": lambda: ReleasedOrder(config, device),
    }
    found: dict[str, dict[str, Any]] = {}
    steppers = {}
    for name in [only] if only else list(made):
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        steppers[name] = made[name]()
        start = time.perf_counter()
        steppers[name].step(batch)
        wait_for(device)
        found[name] = {"first_step_s": round(time.perf_counter() - start, 2), "seconds": [], "peak_gib": 0.0}
        found[name]["held"] = torch.cuda.memory_allocated() - before if device.type == "cuda" else 0
    for _ in range(rounds):
        for name, stepper in steppers.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            stepper.step(batch)
            wait_for(device)
            found[name]["seconds"].append(time.perf_counter() - start)
            if device.type == "cuda":
                others = sum(other["held"] for key, other in found.items() if key != name)
                peak = round((torch.cuda.max_memory_allocated() - others) / 2**30, 2)
                found[name]["peak_gib"] = max(found[name]["peak_gib"], peak)
    for name, stepper in steppers.items():
        clock, times = Clock(device), found[name].pop("seconds")
        for warm in (False, True, True, True) if only is None else ():
            stepper.parts(batch, clock.part if warm else Clock(device).part)
        seconds = statistics.median(times)
        found[name].pop("held")
        found[name] |= {
            "ms": round(1e3 * seconds, 1), "images_per_s": round(config.train.batch / seconds, 2),
            "slowest_ms": round(1e3 * max(times), 1), "parts_ms": clock.medians_ms(),
        }  # fmt: skip
        if device.type == "cpu":
            found[name]["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return found


def peak_alone(name: str) -> float:
    """Return the peak memory of a process that does two steps of one of both, in GiB."""
    line = [sys.executable, *sys.argv, "--only", name, "--rounds", "1"]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])[name]["peak_gib"]


def main(arguments: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="images a step (default: the recipe's train.batch)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each, after one warm-up")
    parser.add_argument(
        "--tf32", action="store_true", help="let fp32 matrix products use tf32; convolutions do so by torch's default"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures")
    parser.add_argument("--only", choices=("ours", "released"), help="measure one of both and print its figures as JSON")
    config, options = cli.parse_config(parser, arguments)
    config.train.batch = options.batch or config.train.batch
    if config.clip.model is not None:
        config.clip.pretrained = "none"
    if options.tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = torch.device(options.device)
    if options.only:
        print(json.dumps(measure(config, device, options.rounds, options.only)))
        return
    alone = {name: peak_alone(name) for name in ("ours", "released")} if device.type == "cpu" else {}
    found = measure(config, device, options.rounds)
    for name, peak in alone.items():
        found[name]["peak_gib"] = peak
    result = {
        "ratio": round(found["released"]["ms"] / found["ours"]["ms"], 2),
        "images_per_s": found["ours"]["images_per_s"],
        "peak_gib": found["ours"]["peak_gib"],
        "hardware": hardware(device),
        "torch": torch.__version__,
        "batch": config.train.batch, "crop": config.augment.crop, "classes": len(labels.class_names(config.classes)),
        "precision": config.precision, "tf32": options.tf32, "compile": config.train.compile,
        **found,
    }  # fmt: skip
    if rate := flops.peak(device):
        operations = flops.per_image(
            WeakCLIP(config, labels.class_names(config.classes)).to(device), config.augment.crop, config.train.batch
        )
        result["mfu"] = round(operations * result["images_per_s"] / rate, 3)
    print(table(result))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def hardware(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    names = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def table(result: dict[str, Any]) -> str:
    """Return the figures as text."""
    ours, released = result["ours"], result["released"]
    rows = [f"{'':<20}{'ours':>12}{'released':>12}"]
    for key in ("ms", "images_per_s", "peak_gib", "first_step_s"):
        rows.append(f"{key:<20}{ours[key]:>12}{released[key]:>12}")
    for part in dict.fromkeys([*ours["parts_ms"], *released["parts_ms"]]):
        rows.append(f"  {part:<18}{ours['parts_ms'].get(part, '-'):>12}{released['parts_ms'].get(part, '-'):>12}")
    return "\n".join([*rows, f"ratio {result['ratio']}  ({result['hardware']}, batch {result['batch']})"])


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
