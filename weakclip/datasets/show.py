"""Draw samples of a shard set as one PNG: image, CAM as a heat map, seed and ground-truth mask in palette colours.

weakclip show shards_train --config configs/voc.yaml --out sheet.png --start 100 --count 8
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np

from weakclip import recipe
from weakclip.config import SeedConfig
from weakclip.data.index import Index
from weakclip.data.reading import load
from weakclip.data.sample import DecodedSample
from weakclip.evaluation import visualize
from weakclip.masks.seeds import cam_maps, seed_mask
from weakclip.runtime.atomic import whole
from weakclip.runtime.command_line import Parser, output_file, run
from weakclip.runtime.errors import UserError


def row(sample: DecodedSample, seeds: SeedConfig) -> visualize.Row:
    """Return a row of all that the sample has. A sample without a seed mask shows the seeds that its CAM gives."""
    found: list[np.ndarray] = [sample.image]
    if sample.cam is not None:
        found.append(visualize.heat(sample.image, cam_maps(sample)))
    if sample.cam is not None or sample.seed is not None:
        found.append(visualize.colour_mask(seed_mask(sample, seeds)))
    if sample.mask is not None:
        found.append(visualize.colour_mask(sample.mask))
    return visualize.Row(sample.name, sample.classes, found)


def add_seed_options(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], SeedConfig]:
    """Add the options that name a recipe, and return a function that gives its `seeds`, or the defaults without a recipe."""
    help_text = "recipe whose `seeds` turn CAMs into seed masks, as in training (default: the published thresholds)"
    parser.add_argument("--config", action="append", metavar="FILE", help=help_text)
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="change to it, such as seeds.background=0.3"
    )

    def seeds_of(options: argparse.Namespace) -> SeedConfig:
        return recipe.load(options.config or [], options.set).seeds

    return seeds_of


def main(arguments: Sequence[str]) -> None:
    parser = Parser(prog="weakclip show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="the shard set: its directory or its URL")
    seeds_of = add_seed_options(parser)
    parser.add_argument("--out", type=output_file, required=True, help="PNG to write")
    parser.add_argument("--start", type=int, default=0, help="index of the first sample, from 0")
    parser.add_argument("--count", type=int, default=8, help="number of samples")
    options = parser.parse_args(arguments)
    index = Index.load(options.directory)
    if options.count < 1 or not 0 <= options.start < len(index.entries):
        raise UserError(f"--start must be 0..{len(index.entries) - 1} and --count at least 1")
    entries = index.entries[options.start : options.start + options.count]
    seeds, samples = seeds_of(options), [load(index, entry) for entry in entries]
    sheet = visualize.sheet([row(sample, seeds) for sample in samples], index.classes)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with whole(options.out) as unfinished:
        sheet.save(unfinished, "PNG")
    print(f"{options.out}: {len(samples)} samples")


if __name__ == "__main__":
    run(main)
