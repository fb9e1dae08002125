"""Rewrite a shard set, or tar shards of another origin, with a given number of samples per shard, in the same order.

weakclip reshard shards_train --out shards_train_large --samples-per-shard 1024
weakclip reshard shards_train --seeds runs/voc/pseudo --out shards_pseudo       # with pseudo masks as seeds
weakclip reshard foreign_tars --classes voc --out shards_train
weakclip reshard img2dataset_tars --classes names.txt --out shards_train              # .jpeg, captions, .tar.gz
weakclip reshard webdataset_tars --classes names.txt --cls foreground0 --out shards   # labels as KEY.cls

The order of training depends on the sizes of the shards, so a run resumes exactly only with the set that it was started with.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from weakclip.data.index import INDEX, Entry, Index, ShardError
from weakclip.data.reading import read_entry
from weakclip.data.sample import PackedSample
from weakclip.datasets.foreign_parts import CLS, LABELS
from weakclip.datasets.foreign_tars import ForeignSample, load_foreign, scan, tar_files, unpacked
from weakclip.datasets.writing import build_shards
from weakclip.labels import class_names
from weakclip.masks.mask_folder import mask_path
from weakclip.runtime.command_line import Parser, input_folder, output_folder, run
from weakclip.runtime.errors import UserError
from weakclip.runtime.workers import map_in_processes

_log = logging.getLogger(__name__)


def load_stored(stored: tuple[Index, Entry], seeds: Path | None = None) -> PackedSample:
    """Read a sample of a shard set. seeds: a folder whose NAME.png becomes the sample's seed mask."""
    index, entry = stored
    parts = read_entry(index, entry)
    if seeds is None:
        return PackedSample(entry.key, parts, f"{index.storage}/{entry.shard}")
    seed = mask_path(seeds, entry.name)
    return PackedSample(entry.key, parts | {"seed.png": seed.read_bytes()}, str(seed))


def stored_samples(index: Index) -> list[tuple[Index, Entry]]:
    """List each sample with an index of only its shard, which is all that a worker process needs."""
    alone = [replace(index, shards=(shard,)) for shard in index.shards]
    return [(one, entry) for one in alone for entry in one.entries]


def foreign_samples(tars: Sequence[Path], processes: int) -> list[ForeignSample]:
    """List the samples of all tars. Raises ShardError when a key is in two of them, and as `scan` does."""
    samples: list[ForeignSample] = []
    for found in tqdm(map_in_processes(scan, processes, tars), total=len(tars), unit=" shards", desc="scan"):
        samples += found
    counts = Counter(sample.key for sample in samples)
    if twice := [sample for sample in samples if counts[sample.key] > 1]:
        tars = [sample.tar for sample in twice if sample.key == twice[0].key]
        raise ShardError(f"{tars[0]}: {twice[0].key}: is in {tars[1].name} too; keys must be unique in a set")
    return samples


def _tell(samples: Sequence[ForeignSample], source: str) -> None:
    """Log in one line what is left out of tars of another origin, and what is made."""
    left_out = Counter(part for sample in samples for part in sample.left_out)
    made = [sample for sample in samples if "json" not in sample.parts]
    unlabelled = sum(LABELS not in sample.parts for sample in made)
    said = ["left out " + ", ".join(f"{number} {part}" for part, number in left_out.items())] if left_out else []
    if made:
        said.append(f"made the json of {len(made)} of {len(samples)} samples, {unlabelled} of them without labels")
    if said:
        _log.info("%s: %s", source, "; ".join(said))


def reshard_foreign(
    source: Path, out: Path, samples_per_shard: int, processes: int, names: Sequence[str], cls: str | None
) -> Index:
    """Write the samples of the tars in the folder `source`. names: the class list. cls: what numbers in KEY.cls mean."""
    with unpacked(tar_files(source), out.resolve()) as tars:
        samples = foreign_samples(tars, processes)
        if cls is not None and not any(LABELS in sample.parts for sample in samples):
            raise UserError(f"--cls {cls}: no sample in {source} has a KEY.{LABELS}; leave --cls out")
        _tell(samples, str(source))
        load = partial(load_foreign, num_classes=len(names), cls=cls)
        return build_shards(samples, load, out, names, samples_per_shard, processes)


def reshard(
    source: str,
    out: Path,
    samples_per_shard: int,
    processes: int,
    classes: str | None = None,
    seeds: Path | None = None,
    cls: str | None = None,
) -> Index:
    if Path(source).is_dir() and not (Path(source) / INDEX).exists():
        if seeds is not None:
            raise UserError(f"--seeds {seeds}: {source} has no {INDEX}; first make a shard set of it without --seeds")
        if classes is None:
            raise UserError(f"{source}: has no {INDEX}, so --classes must name the class list of its samples")
        return reshard_foreign(Path(source), out, samples_per_shard, processes, class_names(classes), cls)
    index = Index.load(source)
    if classes is not None:
        raise UserError(f"--classes {classes}: {source} has an {INDEX}, which lists its classes; leave --classes out")
    if cls is not None:
        raise UserError(f"--cls {cls}: {source} has an {INDEX}, and its samples have their labels; leave --cls out")
    load = partial(load_stored, seeds=seeds)
    return build_shards(stored_samples(index), load, out, index.classes, samples_per_shard, processes)


def main(arguments: Sequence[str]) -> None:
    parser = Parser(prog="weakclip reshard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the shard set, or a directory of .tar files of another origin")
    parser.add_argument("--out", type=output_folder, required=True, help="directory to create")
    parser.add_argument("--samples-per-shard", type=int, default=256, help="images per shard")
    parser.add_argument("--classes", help="class list of tars of another origin: voc, coco or a file of names")
    parser.add_argument("--cls", choices=CLS, help="what KEY.cls counts: foreground classes from 0, or class indices")
    parser.add_argument("--seeds", type=input_folder, metavar="DIR", help="folder of seed masks, NAME.png, such as RUN/pseudo")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1), help="shards written at a time")
    options = parser.parse_args(arguments)
    index = reshard(**vars(options))
    size = sum(shard.bytes for shard in index.shards)
    print(f"{options.out}: {len(index.entries)} samples in {len(index.shards)} shards, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
