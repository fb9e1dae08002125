"""Count what a shard set holds: sizes, images of each class, and the pixels that the seeds of a recipe cover.

weakclip stats shards_train --config configs/voc.yaml --json stats.json
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from weakclip.config import SeedConfig
from weakclip.data.index import Entry, Index, ShardError
from weakclip.data.reading import read_and_decode
from weakclip.data.sample import DecodedSample, decode_sample
from weakclip.datasets.findings import Findings
from weakclip.datasets.show import add_seed_options
from weakclip.labels import IGNORE
from weakclip.masks.seeds import seed_mask
from weakclip.runtime.atomic import write_whole
from weakclip.runtime.command_line import Parser, output_file, run
from weakclip.runtime.tables import Table
from weakclip.runtime.workers import map_in_processes

PARTS = ("labels", "CAM", "seed", "mask")
LEVELS = {"smallest": 0, "10 %": 10, "median": 50, "90 %": 90, "largest": 100}


class ShardStats(NamedTuple):
    """Counts of one shard. N images, M labels of images, S images that have a CAM or a seed."""

    sizes_N2: np.ndarray
    """Height and width in pixels."""
    parts_N4: np.ndarray
    """Which of PARTS an image has."""
    classes_M: np.ndarray
    """Class index of each label."""
    maps_M: np.ndarray
    """Whether the image's CAM has a map of the label."""
    covered_M: np.ndarray
    """Share of the image's pixels that the seed assigns to the label; NaN where there is neither CAM nor seed."""
    seeds_S2: np.ndarray
    """Shares of an image's pixels that its seed assigns to the background, and that it ignores."""


def _load(index: Index, entry: Entry) -> tuple[DecodedSample, dict[str, bytes]]:
    """Return a sample and its members."""

    def decode(parts: dict[str, bytes]) -> tuple[DecodedSample, dict[str, bytes]]:
        return decode_sample(parts, entry, len(index.classes)), parts

    return read_and_decode(index, entry, decode)


def count(index: Index, seeds: SeedConfig) -> tuple[ShardStats, Findings]:
    """Count what the samples of `index` hold, and what disagrees; the seed is the one that training with `seeds` uses."""
    sizes, parts, labels, covered, findings = [], [], [], [], Findings()
    for entry in index.entries:
        sample, members = _load(index, entry)
        findings.add(sample, members, index.classes)
        sizes.append(sample.image.shape[:2])
        parts.append((bool(sample.classes), sample.cam is not None, sample.seed is not None, sample.mask is not None))
        shares = np.full(256, np.nan)
        if sample.cam is not None or sample.seed is not None:
            seed_HW = seed_mask(sample, seeds)
            shares = np.bincount(seed_HW.ravel(), minlength=256) / seed_HW.size
            covered.append((shares[0], shares[IGNORE]))
        mapped = sample.cam.classes if sample.cam else ()
        labels += [(number, number in mapped, shares[number]) for number in sample.classes]
    classes_M, maps_M, covered_M = np.array(labels, float).reshape(-1, 3).T
    parts_N4, seeds_S2 = np.array(parts, bool).reshape(-1, 4), np.array(covered, float).reshape(-1, 2)
    counted = ShardStats(np.array(sizes, int).reshape(-1, 2), parts_N4, classes_M.astype(int), maps_M, covered_M, seeds_S2)
    return counted, findings


def stats(index: Index, processes: int, seeds: SeedConfig) -> dict[str, Any]:
    """Return all figures of a set; shares are in 0..1, and None where there was nothing to count."""
    found, findings = [], Findings()
    alone = [replace(index, shards=(shard,)) for shard in index.shards]  # all that a worker process needs of the index
    with tqdm(total=len(index.entries), unit=" images", desc="stats") as bar:
        for counts, disagreeing in map_in_processes(partial(count, seeds=seeds), processes, alone):
            found.append(counts)
            findings.merge(disagreeing)
            bar.update(len(counts.sizes_N2))
    if not index.entries:
        raise ShardError(f"{index.storage}: holds no sample")
    whole = ShardStats(*map(np.concatenate, zip(*found, strict=True)))
    background, ignored = map(_mean, whole.seeds_S2.T)
    return {
        "set": str(index.storage),
        "images": len(index.entries),
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "images a shard": _spread([len(shard.samples) for shard in index.shards]),
        "bytes a shard": _spread([shard.bytes for shard in index.shards]),
        "height": _spread(whole.sizes_N2[:, 0]),
        "width": _spread(whole.sizes_N2[:, 1]),
        "having": dict(zip(PARTS, whole.parts_N4.sum(0).tolist(), strict=True)),
        "thresholds": {"background": seeds.background, "foreground": seeds.foreground, "crf": seeds.crf is not None},
        "seeds": {"background": background, "ignored": ignored},
        "disagreements": findings.disagreements(),
        "notes": findings.notes(),
        "classes": [_class_stats(whole, number, name) for number, name in enumerate(index.classes) if number],
    }


def _class_stats(counts: ShardStats, number: int, name: str) -> dict[str, Any]:
    """Return the figures of one class.

    They are the images labelled with it, their share of all images, those with a map of it, the mean share of pixels that its
    seeds cover in images that have a CAM or a seed, and the number of these images without such a pixel.
    """
    of_class = counts.classes_M == number
    covered = counts.covered_M[of_class & ~np.isnan(counts.covered_M)]
    images = int(of_class.sum())
    return {
        "name": name,
        "images": images,
        "share": images / len(counts.sizes_N2),
        "maps": int(counts.maps_M[of_class].sum()),
        "covered": _mean(covered),
        "empty": int((covered == 0).sum()),
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _spread(values: Sequence[int] | np.ndarray) -> dict[str, float]:
    return {name: float(np.percentile(values, level)) for name, level in LEVELS.items()}


def tables(found: dict[str, Any]) -> list[Table]:
    """Return the figures as tables to print."""

    def percent(share: float | None) -> float | None:
        return None if share is None else 100 * share

    title = f"{found['set']}: {found['images']} images in {found['shards']} shards, {found['bytes'] / 1e6:.1f} MB"
    spreads = [[name, *found[name].values()] for name in ("images a shard", "height", "width")]
    spreads.insert(1, ["MB a shard", *(size / 1e6 for size in found["bytes a shard"].values())])
    having = [[name, number, percent(number / found["images"])] for name, number in found["having"].items()]
    classes = [
        [one["name"], one["images"], percent(one["share"]), one["maps"], percent(one["covered"]), one["empty"]]
        for one in found["classes"]
    ]
    pixels = [[name, percent(share)] for name, share in found["seeds"].items()]
    at = "seeds at CAM thresholds {background} and {foreground}".format(**found["thresholds"])
    at += ", with a CRF" if found["thresholds"]["crf"] else ""
    return [
        Table(title, ["", *LEVELS], spreads),
        Table("what images have", ["", "images", "%"], having),
        Table(f"{at}, mean share of an image's pixels", ["", "%"], pixels),
        Table(f"{at}, by class", ["", "images", "%", "with a map", "pixels %", "without a pixel"], classes),
    ]


def main(arguments: Sequence[str]) -> None:
    parser = Parser(prog="weakclip stats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="the shard set, a directory with an index.json")
    seeds_of = add_seed_options(parser)
    parser.add_argument("--json", type=output_file, help="file to write the figures to as well")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1), help="shards read at a time")
    parser.add_argument("--strict", action="store_true", help="labels, CAMs, seeds and masks that disagree are an error")
    options = parser.parse_args(arguments)
    found = stats(Index.load(options.directory), options.processes, seeds_of(options))
    print("\n\n".join([*map(str, tables(found)), *found["disagreements"], *found["notes"]]))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.json, json.dumps(found, indent=1) + "\n")
    if options.strict and found["disagreements"]:
        raise ShardError(f"--strict: {found['disagreements'][0]}")


if __name__ == "__main__":
    run(main)
