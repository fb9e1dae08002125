"""Measure time and peak memory of one pseudo mask at full size with random weights: the network and the dense CRF apart.

    python benchmarks/mask.py --config configs/voc.yaml --device cuda --rounds 20 --json mask.json

The image has 500 x 375 pixels; scales, flip and CRF are the recipe's. The network's time is that from the image in memory to the
likely classes' probabilities in memory, by eager mode and, as `train.compile` says, compiled, in alternation. The CRF runs on one
core.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from step import hardware

from weakclip import cli, labels
from weakclip.config import Config
from weakclip.data.sample import DecodedSample
from weakclip.data.transforms import resize_image
from weakclip.masks.fallback import likely_classes
from weakclip.masks.finishing import mask_of
from weakclip.masks.mask_folder import MaskSettings
from weakclip.models.weakclip import WeakCLIP
from weakclip.runtime.command_line import output_file

R = TypeVar("R")


def timed(work: Callable[[], R], times: list[float]) -> R:
    start = time.perf_counter()
    result = work()
    times.append(time.perf_counter() - start)
    return result


def measure(config: Config, device: torch.device, rounds: int) -> dict[str, Any]:
    """Return the medians of `rounds` masks, after one that is not counted."""
    coarse_hw3 = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    image_HW3 = resize_image(coarse_hw3, (375, 500))  # smooth, as photographs are: on noise the CRF takes many times as long
    sample = DecodedSample("smooth", image_HW3, (1,), cam=None, seed=None, mask=None)
    model = WeakCLIP(config, labels.class_names(config.classes)).to(device).eval()
    model.cast_frozen()
    predictor, settings = model.predictor(), MaskSettings.of(config)
    compiles = config.train.compile == "on" or (config.train.compile == "auto" and device.type == "cuda")
    ways = {"eager": predictor} | ({"compiled": predictor._replace(compiled=True)} if compiles else {})
    network: dict[str, list[float]] = {way: [] for way in ways}
    crf: list[float] = []
    for _ in range(rounds + 1):
        for way, chosen in ways.items():  # the result is in memory, so the device is done
            found = timed(partial(likely_classes, chosen, sample, settings), network[way])
        timed(partial(mask_of, found, image_HW3, config.pseudo.crf), crf)
    cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "network_ms": {way: round(1e3 * statistics.median(times[1:]), 1) for way, times in network.items()},
        "first_s": {way: round(times[0], 2) for way, times in network.items()},
        "crf_ms": round(1e3 * statistics.median(crf[1:]), 1),
        "peak_gib": round(peak / 2**30, 2),
        "classes": model.num_classes,
        "hardware": hardware(device),
        "torch": torch.__version__,
    }


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3, help="timed masks, after one warm-up")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures")
    config, options = cli.parse_config(parser, arguments)
    if config.clip.model is not None:
        config.clip.pretrained = "none"
    figures = json.dumps(measure(config, torch.device(options.device), options.rounds), indent=1)
    print(figures)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(figures + "\n")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
