"""Write a shard set, or tar shards of another origin, anew with so many samples a shard; order and members stay as they are.

python shards/reshard.py shards_train --out shards_train_large --samples-per-shard 1024
python shards/reshard.py shards_train --seeds runs/voc/pseudo --out shards_pseudo       # with pseudo masks as seeds
python shards/reshard.py foreign_tars --classes voc --out shards_train

The order of training depends on the shards' sizes: a run goes on exactly only with the set that it was begun with.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from weakclip import cli
from weakclip.data.index import INDEX, Entry, Index, ShardError
from weakclip.data.reading import read_entry
from weakclip.data.sample import PackedSample
from weakclip.datasets.foreign_tars import ForeignSample, load_foreign, scan, tar_files
from weakclip.datasets.writing import build_shards
from weakclip.labels import class_names
from weakclip.runtime.workers import map_in_processes


def load_stored(stored: tuple[Index, Entry], seeds: Path | None = None) -> PackedSample:
    """seeds: the folder of a KEY.png that becomes the sample's seed mask."""
    index, entry = stored
    parts = read_entry(index, entry)
    if seeds is None:
        return PackedSample(entry.key, parts, f"{index.storage}/{entry.shard}")
    seed = seeds / f"{entry.key}.png"
    return PackedSample(entry.key, parts | {"seed.png": seed.read_bytes()}, str(seed))


def stored_samples(index: Index) -> list[tuple[Index, Entry]]:
    """Each sample beside an index of its shard alone: a process needs no more of it."""
    alone = [replace(index, shards=(shard,)) for shard in index.shards]
    return [(one, entry) for one in alone for entry in one.entries]


def foreign_samples(directory: Path, processes: int) -> list[ForeignSample]:
    """The samples of all tars of a directory. Raises ShardError when a key is in two of them, and as `scan` does."""
    samples: list[ForeignSample] = []
    tars = tar_files(directory)
    for found in tqdm(map_in_processes(scan, processes, tars), total=len(tars), unit=" shards", desc="scan"):
        samples += found
    counts = Counter(sample.key for sample in samples)
    if twice := [sample for sample in samples if counts[sample.key] > 1]:
        tars = [sample.tar for sample in twice if sample.key == twice[0].key]
        raise ShardError(f"{tars[0]}: {twice[0].key}: is in {tars[1].name} too; keys must differ in a set")
    return samples


def reshard(
    source: str, out: Path, samples_per_shard: int, processes: int, classes: str | None = None, seeds: Path | None = None
) -> Index:
    if Path(source).is_dir() and not (Path(source) / INDEX).exists():
        if seeds is not None:
            raise ValueError(f"--seeds {seeds}: {source} has no {INDEX}; first make a shard set of it, then put the seeds in")
        if classes is None:
            raise ValueError(f"{source}: has no {INDEX}, so --classes must say which class list its samples follow")
        names, samples = class_names(classes), foreign_samples(Path(source), processes)
        return build_shards(samples, load_foreign, out, names, samples_per_shard, processes)
    index = Index.load(source)
    if classes is not None:
        raise ValueError(f"--classes {classes}: {source} has an {INDEX}, which says its classes; leave --classes out")
    load = partial(load_stored, seeds=seeds)
    return build_shards(stored_samples(index), load, out, index.classes, samples_per_shard, processes)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the shard set, or a directory of .tar files of another origin")
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--samples-per-shard", type=int, default=256, help="images in a shard")
    parser.add_argument("--classes", help="class list of tars of another origin: voc, coco or a file of names")
    parser.add_argument("--seeds", type=Path, metavar="DIR", help="folder of KEY.png, such as RUN/pseudo, for seed masks")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1), help="shards written at a time")
    options = parser.parse_args(arguments)
    index = reshard(**vars(options))
    size = sum(shard.bytes for shard in index.shards)
    print(f"{options.out}: {len(index.entries)} samples in {len(index.shards)} shards, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
