"""Test the retrained network: write its masks of a shard set, and their scores.

weakclip test --config configs/retrain/segformer.yaml [--weights best] [--shards 0:8] [key=value ...]
weakclip test --config configs/retrain/segformer.yaml --split test --data data/voc/test --archive comp6.tar
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from weakclip import cli, evaluate, pseudo
from weakclip.config import Config, ConfigError
from weakclip.data.index import Entry, Index, open_index, select_shards
from weakclip.data.reading import load
from weakclip.evaluation.score_files import Scored
from weakclip.masks import mask_folder
from weakclip.runtime.atomic import whole
from weakclip.runtime.command_line import output_file, shard_set
from weakclip.training import jobs
from weakclip.training.jobs import Job

ARCHIVE = "results/VOC2012/Segmentation/comp6_test_cls"
"""Folder in which PASCAL VOC's evaluation server expects masks (the development kit's documentation, section 4.2.2)."""


def open_data(job: Job, data: str | None) -> Index:
    """Return the shard set to test on. Raises ConfigError when there is none."""
    path = data or job.data.val
    if path is None:
        raise ConfigError("data.val is null; set it to the shard set that the network is tested on")
    return open_index(path, job.names, job.data)


def run(config: Config, part: str | None) -> None:
    """Run the stage `test`: write the masks of the shards "A:B" of `data.val`, and their counts.

    The task that finds all shards counted adds the counts up.
    """
    job = jobs.retrain(config)
    index = open_data(job, None)
    place = Scored.predicted(job.run, "val")
    pseudo.write(job, index, part, job.run.find_weights("best"), place.masks)
    evaluate.score_shards(index, part, place, job.data.workers)


def write_archive(folder: Path, entries: Iterable[Entry], path: Path) -> None:
    """Write the masks of `entries` as the tar that VOC's evaluation server takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as unfinished, tarfile.open(unfinished, "x") as tar:
        for entry in entries:
            mask_folder.read(folder, entry.name)  # raises an error naming a damaged mask
            png = mask_folder.mask_path(folder, entry.name).read_bytes()
            member = tarfile.TarInfo(f"{ARCHIVE}/{entry.name}.png")
            member.size = len(png)
            tar.addfile(member, io.BytesIO(png))


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(prog="weakclip test", description="Test the retrained network.")
    parser.add_argument("--weights", default="best", metavar="best|last|FILE", help="which weights (default: best)")
    parser.add_argument("--data", type=shard_set, metavar="DIR", help="shard set (default: data.val)")
    parser.add_argument("--split", default="val", metavar="NAME", help="its name: masks-NAME, scores-NAME.json (default: val)")
    parser.add_argument("--shards", metavar="N|A:B", help="only these shards of it")
    parser.add_argument("--archive", type=output_file, metavar="FILE", help="tar to write for VOC's evaluation server")
    config, options = cli.parse_config(parser, arguments)
    job = jobs.retrain(config)
    index = open_data(job, options.data)
    place, entries = Scored.predicted(job.run, options.split), select_shards(index, options.shards)
    pseudo.write(job, index, options.shards, job.run.find_weights(options.weights), place.masks)
    if load(index, entries[0]).mask is None:
        print(f"{place.masks}: not scored, because {index.storage} has no ground truth")
    else:
        evaluate.score_shards(index, options.shards, place, job.data.workers)
    if options.archive:
        write_archive(place.masks, entries, options.archive)
        print(f"written: {options.archive}")


if __name__ == "__main__":
    cli.run(main)
