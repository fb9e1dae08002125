"""Build a shard set from images, their labels and their CAMs or seeds.

python shards/build.py coco --images train2014 --annotations instances_train2014.json --cams cams --out shards_train
python shards/build.py voc --devkit VOCdevkit/VOC2012 --split trainaug --cams cams --out shards_trainaug
python shards/build.py folder --images pictures --labels labels.csv --classes names.txt --cams cams --out shards_mine
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from weakclip import cli
from weakclip.config import Config, ConfigError
from weakclip.datasets.cam_files import CAM_KEYS
from weakclip.datasets.coco import coco_items
from weakclip.datasets.folder import folder_items
from weakclip.datasets.items import Item, labelled, load_item, version, with_cams
from weakclip.datasets.voc import voc_items
from weakclip.datasets.writing import Build
from weakclip.labels import COCO, VOC, class_map, class_names


def parse_args(
    arguments: Sequence[str], parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser
) -> argparse.Namespace:
    parser = parser_class(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(dest="source", required=True)
    coco = sources.add_parser("coco", help="COCO 2014 or 2017 in its usual layout")
    coco.add_argument("--images", type=Path, required=True, help="directory of the split's images")
    coco.add_argument("--annotations", type=Path, required=True, help="its instances_*.json, for the labels")
    coco.add_argument("--masks", action="store_true", help="add ground-truth masks, for evaluation")
    voc = sources.add_parser("voc", help="PASCAL VOC 2012 in the layout of its development kit")
    voc.add_argument("--devkit", type=Path, required=True, help="the directory VOCdevkit/VOC2012")
    voc.add_argument("--split", required=True, help="trainaug, train, val, test (in ImageSets/Segmentation), or a list of names")
    voc.add_argument("--labels", type=Path, help="cls_labels.npy, {name: 20 zeros and ones}, for images without XML")
    voc.add_argument("--masks", action="store_true", help="add the masks of SegmentationClass or SegmentationClassAug")
    folder = sources.add_parser("folder", help="a folder of JPEG and PNG images")
    folder.add_argument("--images", type=Path, required=True, help="the folder")
    folder.add_argument("--labels", type=Path, help="CSV with the columns file,labels; labels are names parted by ';'")
    folder.add_argument("--masks", type=Path, help="folder of KEY.png, for evaluation")
    for source, names in ((coco, "coco"), (voc, "voc"), (folder, None)):
        source.add_argument("--classes", default=names, required=names is None,
                            help="class list of the new set: voc, coco or a file of names, background first")  # fmt: skip
        source.add_argument("--cams", type=Path, help="directory of KEY.npy, KEY.npz (CAMs) or KEY.png (seeds)")
        source.add_argument("--cam-keys", choices=CAM_KEYS if source is coco else CAM_KEYS[:2], default="foreground0",
                            help="keys in the CAM files: foreground classes from 0, class indices, or COCO's ids")  # fmt: skip
        source.add_argument("--out", type=Path, required=True, help="directory to make")
        source.add_argument("--samples-per-shard", type=int, default=256, help="images in a shard")
        source.add_argument("--processes", type=int, default=4, help="shards written at a time")
        source.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    return parser.parse_args(arguments)


def list_items(args: argparse.Namespace) -> tuple[list[Item], Sequence[str]]:
    """The images of the source, and its own class list."""
    if args.source == "coco":
        return coco_items(args.images, args.annotations, args.masks), COCO
    if args.source == "voc":
        return voc_items(args.devkit, args.split, args.labels, args.masks), VOC
    names = class_names(args.classes)
    return folder_items(args.images, names, args.labels, args.masks), names


def plan(args: argparse.Namespace) -> Build[Item]:
    """The set that the options describe. Raises ShardError where they don't fit what is there."""
    target = class_names(args.classes)
    found, names = list_items(args)
    to_target = class_map(names, target)
    items = labelled(found, to_target)
    if len(items) < len(found):
        print(f"left out {len(found) - len(items)} of {len(found)} images: they have no label of the {len(target) - 1} classes")
    if args.cams:
        items = with_cams(items, args.cams)
    load = partial(load_item, class_map=to_target, cam_keys=args.cam_keys)
    return Build(items, load, args.out.resolve(), target, args.samples_per_shard, about(args), version)


def about(args: argparse.Namespace) -> dict[str, Any]:
    """The options that decide the samples, for JSON."""
    free = ("out", "processes")
    return {
        name: str(value.resolve()) if isinstance(value, Path) else value for name, value in vars(args).items() if name not in free
    }


class _Options(argparse.ArgumentParser):
    """Options that stand in a recipe."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"data.build: {message}; it holds the options of shards/build.py, such as [voc, --devkit, DIR, ...]")


def of_recipe(config: Config) -> argparse.Namespace:
    """The options in `data.build`, for a set at `config.labelled`. Raises ConfigError where they are none."""
    options = config.data.build
    if taken := [option for option in options if option.split("=")[0] in ("--out", "--classes")]:
        raise ConfigError(f"data.build: leave {taken[0]} out; the set becomes {config.labelled}, with the recipe's classes")
    return parse_args([*options, f"--classes={config.classes}", f"--out={config.labelled}"], _Options)


def main(arguments: Sequence[str]) -> None:
    args = parse_args(arguments)
    index = plan(args).run(args.processes)
    assert index is not None  # this process wrote all that was missing
    size = sum(shard.bytes for shard in index.shards)
    print(f"{args.out}: {len(index.entries)} samples in {len(index.shards)} shards, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
