"""Draw samples of a shard set as one PNG: image, CAM as heat, seed and ground-truth mask in the palette's colours.

python shards/show.py shards_train --out sheet.png --start 100 --count 8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from weakclip import cli
from weakclip.config import SeedConfig
from weakclip.data.index import Index
from weakclip.data.reading import load
from weakclip.data.sample import DecodedSample
from weakclip.evaluation import visualize
from weakclip.masks.seeds import cam_maps, seed_mask


def row(sample: DecodedSample, seeds: SeedConfig) -> visualize.Row:
    """What the sample has. Without a seed in it, the seed is what the CAM gives."""
    found: list[np.ndarray] = [sample.image]
    if sample.cam is not None:
        found.append(visualize.heat(sample.image, cam_maps(sample)))
    if sample.cam is not None or sample.seed is not None:
        found.append(visualize.colour_mask(seed_mask(sample, seeds)))
    if sample.mask is not None:
        found.append(visualize.colour_mask(sample.mask))
    return visualize.Row(sample.key, sample.classes, found)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="the shard set: its directory or its URL")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--start", type=int, default=0, help="number of the first sample, from 0")
    parser.add_argument("--count", type=int, default=8, help="how many samples")
    options = parser.parse_args(arguments)
    index = Index.load(options.directory)
    if options.count < 1 or not 0 <= options.start < len(index.entries):
        raise ValueError(f"--start must be 0..{len(index.entries) - 1} and --count at least 1")
    entries = index.entries[options.start : options.start + options.count]
    samples = [load(index, entry) for entry in entries]
    visualize.sheet([row(sample, SeedConfig()) for sample in samples], index.classes).save(options.out, "PNG")
    print(f"{options.out}: {len(samples)} samples")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
