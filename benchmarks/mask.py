"""Measure time and peak memory of one pseudo mask at full size with random weights.

    python benchmarks/mask.py --config configs/voc.yaml

The image has 500 x 375 pixels; scales, flip and CRF are the recipe's.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from weakclip import cli, labels
from weakclip.config import Config
from weakclip.data.sample import DecodedSample
from weakclip.masks.mask_folder import MaskSettings
from weakclip.masks.writing import predict_mask
from weakclip.models.weakclip import WeakCLIP


def mask(model: WeakCLIP, config: Config) -> Callable[[], object]:
    """Return a function that makes the mask."""
    image_HW3 = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)
    sample = DecodedSample("noise", image_HW3, (1,), cam=None, seed=None, mask=None)
    predictor, settings = model.eval().predictor(), MaskSettings.of(config)
    return lambda: predict_mask(predictor, sample, settings)


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="timed repetitions, after one warm-up")
    config, options = cli.parse_config(parser, arguments)
    config.clip.pretrained = "none"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = WeakCLIP(config, labels.class_names(config.classes)).to(device)
    once = mask(model, config)
    seconds = []
    for _ in range(options.repeat + 1):
        start = time.perf_counter()
        once()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = (
        torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"mask, K = {len(model.names_KL)}, {where}: median {statistics.median(seconds[1:] or seconds):.2f} s of "
        f"{[round(s, 2) for s in seconds]}, peak memory {peak / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
