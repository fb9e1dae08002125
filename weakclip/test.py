"""Test the network that was retrained: its masks of a shard set, and their scores.

python -m weakclip.test --config configs/retrain/segformer.yaml [--weights best] [--shards 0:8] [key=value ...]
python -m weakclip.test --config configs/retrain/segformer.yaml --split test --data data/voc/test --archive comp6.tar
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from weakclip import cli, evaluate, pseudo
from weakclip.checkpoints import weights as stored
from weakclip.config import Config, ConfigError
from weakclip.data.index import Entry, Index, open_index, select_shards
from weakclip.data.reading import load
from weakclip.evaluation.score_files import Scored
from weakclip.masks import mask_folder
from weakclip.runtime.atomic import whole
from weakclip.training.jobs import Retrain

ARCHIVE = "results/VOC2012/Segmentation/comp6_test_cls"
"""Where the evaluation server of PASCAL VOC looks for masks (the development kit's documentation, section 4.2.2)."""


def open_data(task: Retrain, data: str | None) -> Index:
    """The shard set to test on. Raises ConfigError when there is none."""
    path = data or task.config.data.val
    if path is None:
        raise ConfigError("data.val is null: it names the shard set that the network is tested on")
    return open_index(path, task.names, task.config.data)


def run(config: Config, part: str | None) -> None:
    """The stage: masks of the shards "A:B" of `data.val` and their counts. Who finds that all are counted adds them up."""
    task = Retrain(config)
    index = open_data(task, None)
    place = Scored.predicted(task.run, "val")
    pseudo.write(task, index, part, stored.find(task.config, "best"), place.masks)
    evaluate.score_shards(task.config, index, part, place)


def write_archive(folder: Path, entries: Iterable[Entry], path: Path) -> None:
    """The masks of `entries` as the tar that VOC's evaluation server takes."""
    with whole(path) as unfinished, tarfile.open(unfinished, "x") as tar:
        for entry in entries:
            mask_folder.read(folder, entry.key)  # names a damaged one
            png = (folder / f"{entry.key}.png").read_bytes()
            member = tarfile.TarInfo(f"{ARCHIVE}/{entry.key}.png")
            member.size = len(png)
            tar.addfile(member, io.BytesIO(png))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m weakclip.test", description="Test the network that was retrained.")
    parser.add_argument("--weights", default="best", metavar="best|last|FILE", help="which weights (default: best)")
    parser.add_argument("--data", metavar="DIR", help="shard set (default: data.val)")
    parser.add_argument("--split", default="val", metavar="NAME", help="its name: masks-NAME and scores-NAME.json (default: val)")
    parser.add_argument("--shards", metavar="N|A:B", help="only these shards of it")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="tar to write for VOC's evaluation server")
    config, options = cli.parse_config(parser, arguments)
    task = Retrain(config)
    index = open_data(task, options.data)
    place, entries = Scored.predicted(task.run, options.split), select_shards(index, options.shards)
    pseudo.write(task, index, options.shards, stored.find(task.config, options.weights), place.masks)
    if load(index, entries[0]).mask is None:
        print(f"{place.masks}: not scored, since {index.storage} has no ground truth")
    else:
        evaluate.score_shards(task.config, index, options.shards, place)
    if options.archive:
        write_archive(place.masks, entries, options.archive)
        print(f"written: {options.archive}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
