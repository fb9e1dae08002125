"""Build a shard set from images, their labels, and their CAMs or seeds.

weakclip build coco --images train2014 --annotations instances_train2014.json --cams cams --out shards_train
weakclip build voc --devkit VOCdevkit/VOC2012 --split trainaug --cams cams --out shards_trainaug
weakclip build folder --images images --labels labels.csv --classes names.txt --cams cams --out shards_mine
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from weakclip.config import CAM_KEYS, EXIF, STORED, BuildConfig, Config, ConfigError
from weakclip.data.index import ShardError, select_numbers
from weakclip.datasets import writing
from weakclip.datasets.items import Item, labelled, version, with_cams
from weakclip.datasets.loading import load_item
from weakclip.datasets.writing import Build
from weakclip.labels import COCO, VOC, class_map, class_names
from weakclip.registry import DATA_SETS, load
from weakclip.runtime.atomic import write_whole
from weakclip.runtime.command_line import Parser, run

PATHS = ("images", "annotations", "devkit", "labels", "mask_dir", "cams")
"""Fields of BuildConfig that are paths."""

FROM_ANNOTATIONS = "from-annotations"

_log = logging.getLogger(__name__)


def plan(build: BuildConfig, out: Path, classes: str) -> Build[Item]:
    """Return the shard set to write. build: its `source` must be set. classes: class list of the new set, as `Config.classes`.

    Raises UserError or OSError naming what is missing or inconsistent in the data set.
    """
    for name in PATHS:
        if (path := getattr(build, name)) is not None and not Path(path).exists():
            raise ConfigError(f"{_option(name)} (data.build.{name}): {path} does not exist")
    data_set = DATA_SETS[str(build.source)]
    target = class_names(classes)
    own, found = load(data_set.items)(build, target)
    if build.cam_keys == "coco" and own != COCO:
        raise ConfigError("cam_keys=coco: the annotations' categories are not COCO's; use foreground0 or class")
    to_target = class_map(own, target)
    items = labelled(found, to_target)
    if len(items) < len(found):
        unlabelled = len(found) - len(items)
        _log.info("left out %d of %d images: they have no label of the %d classes", unlabelled, len(found), len(target) - 1)
    if build.cams:
        items = with_cams(items, Path(build.cams))
    read = partial(load_item, class_map=to_target, cam_keys=build.cam_keys, in_colours=tuple(own) == VOC)
    about = provenance(build, classes)
    return Build(items, read, out.resolve(), target, build.samples_per_shard, about, version, build.strict)


def ready(planned: Build[Item], build: BuildConfig) -> Build[Item]:
    """Return a planned set with its images turned upright if `build` says so, for which each of them is opened."""
    if build.exif == STORED:
        return planned
    return replace(planned, items=load("weakclip.datasets.upright:turned_upright")(planned.items))


def plan_of(config: Config) -> Build[Item]:
    """Return the shard set that `data.build` of a recipe describes. Raises ConfigError where it describes none."""
    if config.data.build.source is None:
        raise ConfigError("data.build.source is null; set it to what the shards are built from: coco, voc or folder")
    return plan(config.data.build, Path(config.data.built), config.classes)


def written(config: Config) -> tuple[int, int]:
    """Return the number of existing shards of the set in `data.build`, and of all its shards.

    Raises ConfigError when its directory holds something else.
    """
    planned = plan_of(config)
    key = "data.train" if config.data.labelled is None else "data.labelled"
    return writing.written(Path(config.data.built), planned.provenance, key, "data.build") or (0, planned.shards)


def run_part(config: Config, part: str | None) -> None:
    """Run the stage `shards`: write those of the shards "A:B" that are missing."""
    done, total = written(config)
    if done < total:
        planned = ready(plan_of(config), config.data.build)
        planned.run(config.data.build.processes, select_numbers(planned.shards, part, config.data.built))


def provenance(build: BuildConfig, classes: str) -> dict[str, Any]:
    """Return what decides the samples, for JSON.

    The keys are part of the format of build.json, in which `masks` may be a path.
    """
    names = ("source", *DATA_SETS[str(build.source)].options, "cams", "cam_keys", "samples_per_shard")
    values = {name: getattr(build, name) for name in names}
    found = {name: str(Path(value).resolve()) if name in PATHS and value else value for name, value in values.items()}
    found |= {} if build.exif == STORED else {"exif": build.exif}
    if not build.recursive:  # an option that earlier versions did not have
        found.pop("recursive", None)
    if "mask_dir" in found:
        found["masks"] = found.pop("mask_dir")
    return {**found, "classes": classes}


def parse_args(arguments: Sequence[str]) -> tuple[BuildConfig, Path, str]:
    """Return what a command line asks to build, the directory, and the class list."""
    parser = Parser(prog="weakclip build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_subparsers(dest="source", required=True)
    for source, data_set in DATA_SETS.items():
        sub = sources.add_parser(source, help=data_set.description, formatter_class=_Help)
        for name, help_text in data_set.options.items():
            _add_option(sub, name, help_text, required=name in data_set.required)
        own = f", or {FROM_ANNOTATIONS}, which writes OUT.names.txt" if source == "coco" else ""
        sub.add_argument("--classes", default=data_set.classes, required=data_set.classes is None,
                         help=f"class list of the new set: voc, coco or a file of names, background first{own}")  # fmt: skip
        sub.add_argument("--cams", help="directory of NAME.npy, NAME.npz (CAMs) or NAME.png (seeds)")
        sub.add_argument("--cam-keys", choices=CAM_KEYS if source == "coco" else CAM_KEYS[:2], default="foreground0",
                         help="keys in the CAM files: foreground classes from 0, class indices, or COCO's ids")  # fmt: skip
        sub.add_argument("--exif", choices=EXIF, default=STORED,
                         help="use images with an EXIF orientation as stored, or turn them, their masks and CAMs")  # fmt: skip
        sub.add_argument("--strict", action="store_true", help="labels, CAMs and masks that disagree are an error")
        sub.add_argument("--out", type=Path, required=True, help="directory to create")
        sub.add_argument("--samples-per-shard", type=int, default=256, help="images per shard")
        sub.add_argument("--processes", type=int, default=4, help="worker processes, each of which writes whole shards")
    options = vars(parser.parse_args(arguments))
    out, classes = options.pop("out"), options.pop("classes")
    return BuildConfig(**options), out, classes


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows the defaults there are, and which options are required."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required:
            return f"{action.help} (required)"
        return super()._get_help_string(action) if action.default else action.help


def _option(name: str) -> str:
    """Return the command-line option of a field of BuildConfig."""
    return "--masks" if name == "mask_dir" else f"--{name.replace('_', '-')}"


def _add_option(parser: argparse.ArgumentParser, name: str, help_text: str, required: bool) -> None:
    (kind,) = (item.type for item in fields(BuildConfig) if item.name == name)
    if kind == "bool":
        parser.add_argument(_option(name), action="store_true", help=help_text)
    else:
        parser.add_argument(_option(name), dest=name, metavar="PATH", required=required, help=help_text)


def write_classes(annotations: Path, out: Path) -> Path:
    """Write a COCO file's annotated categories to OUT.names.txt and return its path. Raises ShardError if that holds others."""
    names = load("weakclip.datasets.coco:own_classes")(annotations)
    path, text = out.with_name(f"{out.name}.names.txt"), "\n".join(names) + "\n"
    if path.exists() and path.read_text() != text:
        raise ShardError(f"{path}: lists other classes than {annotations}; remove it, or give it as --classes")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    print(f"{path}: the classes of {annotations}; set `classes` in the recipe to this file")
    return path


def main(arguments: Sequence[str]) -> None:
    build, out, classes = parse_args(arguments)
    if build.source == "coco" and classes == FROM_ANNOTATIONS:
        classes = str(write_classes(Path(str(build.annotations)), out))
    index = ready(plan(build, out, classes), build).run(build.processes)
    assert index is not None  # this process wrote all that was missing
    size = sum(shard.bytes for shard in index.shards)
    print(f"{out}: {len(index.entries)} samples in {len(index.shards)} shards, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
