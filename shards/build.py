"""Build a shard set from images, their labels and their CAMs or seeds.

python shards/build.py coco --images train2014 --annotations instances_train2014.json --cams cams --out shards_train
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from weakclip import cli
from weakclip.data.shard import Index, build_shards
from weakclip.data.sources import CAM_KEYS, coco_items, load_coco
from weakclip.labels import COCO


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    coco = parser.add_subparsers(dest="source", required=True).add_parser(
        "coco", help="COCO 2014 or 2017 in its usual layout", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    coco.add_argument("--images", type=Path, required=True, help="directory of the split's images")
    coco.add_argument("--annotations", type=Path, required=True, help="its instances_*.json, for the labels")
    coco.add_argument("--cams", type=Path, help="directory of KEY.npy, KEY.npz (CAMs) or KEY.png (seeds)")
    coco.add_argument("--cam-keys", choices=CAM_KEYS, default="foreground0",
                      help="keys in the CAM files: foreground classes from 0, class indices, or COCO ids")  # fmt: skip
    coco.add_argument("--masks", action="store_true", help="add ground-truth masks, for evaluation")
    coco.add_argument("--out", type=Path, required=True, help="directory to make")
    coco.add_argument("--samples-per-shard", type=int, default=256, help="images in a shard")
    coco.add_argument("--processes", type=int, default=4, help="shards written at a time")
    return parser.parse_args(arguments)


def build_coco(args: argparse.Namespace) -> Index:
    items = coco_items(args.images, args.annotations, args.cams, args.masks)
    labelled = [item for item in items if item.classes]
    if len(labelled) < len(items):
        print(f"left out {len(items) - len(labelled)} of {len(items)} images: nothing is annotated in them")
    load = partial(load_coco, cam_keys=args.cam_keys)
    return build_shards(labelled, load, args.out, COCO, args.samples_per_shard, args.processes)


def main(arguments: Sequence[str]) -> None:
    args = parse_args(arguments)
    index = build_coco(args)
    size = sum(shard.bytes for shard in index.shards)
    print(f"{args.out}: {len(index.entries)} samples in {len(index.shards)} shards, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
