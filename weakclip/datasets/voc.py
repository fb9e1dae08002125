"""PASCAL VOC 2012 in the layout of its development kit, with the lists and masks that segmentation papers add."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from tqdm import tqdm

from weakclip.config import BuildConfig
from weakclip.data.index import ShardError
from weakclip.datasets.cam_files import read_dict
from weakclip.datasets.items import Item, Listing
from weakclip.labels import VOC, read_text

MASKS = ("SegmentationClass/{}.png", "SegmentationClassAug/{}.png", "SegmentationClassAug/{}.mat", "cls/{}.mat")
"""Files of masks below the devkit: VOC's own, then those that trainaug takes from SBD, which are .mat files as published."""

_log = logging.getLogger(__name__)


def items(build: BuildConfig, _target: Sequence[str]) -> Listing:
    """List the images that `build` describes."""
    labels = Path(build.labels) if build.labels else None
    return Listing(VOC, voc_items(Path(str(build.devkit)), str(build.split), labels, build.masks))


def voc_items(devkit: Path, split: str, labels: Path | None = None, with_masks: bool = False) -> list[Item]:
    """List the images of a split, in its order. Their classes are those of all objects in the XML, difficult ones included.

    split: a list in `devkit`/ImageSets/Segmentation, such as trainaug, or another list file; test images have no labels.
    labels: a cls_labels.npy, for images that have no XML. Raises ShardError or OSError naming the file at fault.
    """
    if not (devkit / "JPEGImages").is_dir():
        raise ShardError(f"{devkit}: has no JPEGImages; --devkit must be the directory VOCdevkit/VOC2012")
    if split == "test" and labels:
        raise ShardError(f"{labels}: VOC's test images have no labels; leave --labels out")
    multi_hot = _read_labels(labels) if labels else {}
    items = []
    with tqdm(_read_split(devkit, split), unit=" images", desc="labels") as keys:
        for key in keys:
            image = devkit / "JPEGImages" / f"{key}.jpg"
            if not image.is_file():
                raise ShardError(f"{image}: no such image, but {split} lists it")
            classes = None if split == "test" else _classes(devkit / "Annotations" / f"{key}.xml", multi_hot, key)
            items.append(Item(key, image, classes, mask=_find_mask(devkit, key) if with_masks else None))
    return items


def _read_split(devkit: Path, split: str) -> list[str]:
    """Read the names in a list: the first word of each line, which some repositories write as /JPEGImages/NAME.jpg.

    In a list of ImageSets/Main a second word says whether the image has the class: 1, only as a difficult object 0, or not, -1.
    """
    own = devkit / "ImageSets" / "Segmentation" / f"{split}.txt"
    file = own if own.is_file() else Path(split)
    if not file.is_file():
        raise ShardError(f"{own}: no such split, and {split!r} is not a file; --split is a name in that directory or a list file")
    rows = [line.split() for line in read_text(file, ShardError).splitlines() if line.strip()]
    kept = [row for row in rows if row[1:] != ["-1"]]
    if len(kept) < len(rows):
        _log.info("%s: %d of %d rows are marked -1 and left out", file, len(rows) - len(kept), len(rows))
    return [_without_suffix(Path(row[0]).name) for row in kept]


def _without_suffix(name: str) -> str:
    return Path(name).stem if Path(name).suffix.lower() in (".jpg", ".png") else name


def _find_mask(devkit: Path, key: str) -> Path:
    places = [place.format(key) for place in MASKS]
    found = next((file for place in places if (file := devkit / place).is_file()), None)
    if found is None:
        raise ShardError(f"{devkit / places[0]}: no such mask, nor {', '.join(places[1:])}; add it, or leave --masks out")
    return found


# -------------------------------------------------------------------------------------------------------------- labels


def _classes(xml: Path, multi_hot: dict[Any, Any], key: str) -> tuple[int, ...]:
    if xml.is_file():
        return _xml_classes(xml)
    # IRN's file has integers as names: 2007000032.
    number = int(key.replace("_", "")) if key.replace("_", "").isdecimal() else None
    if (name := next((name for name in (key, number) if name in multi_hot), None)) is None:
        raise ShardError(f"{xml}: no such file; pass the labels of {key} in a cls_labels.npy with --labels")
    hot_n = multi_hot[name]
    if not isinstance(hot_n, np.ndarray) or hot_n.shape != (len(VOC) - 1,) or not np.isin(hot_n, (0, 1)).all():
        raise ShardError(f"--labels: {name!r} must have {len(VOC) - 1} zeros and ones, one per class without background")
    return tuple((np.flatnonzero(hot_n) + 1).tolist())


def _read_labels(file: Path) -> dict[Any, Any]:
    if file.suffix not in (".npy", ".npz"):
        raise ShardError(f"{file}: --labels must be a .npy or .npz of {{name: {len(VOC) - 1} zeros and ones}}")
    return read_dict(file)


def _xml_classes(file: Path) -> tuple[int, ...]:
    """Return the class indices of the objects in one annotation, ascending."""
    data = file.read_bytes()
    try:
        root = ElementTree.fromstring(data)
    except Exception as error:  # a parser of damaged bytes may raise nearly anything
        raise ShardError(f"{file}: not XML ({error})") from None
    if root.tag != "annotation":
        raise ShardError(f"{file}: not a VOC annotation: its root is <{root.tag:.40}>")
    names = {(found.findtext("name") or "").strip() for found in root.findall("object")}
    if unknown := names - set(VOC[1:]):
        raise ShardError(f"{file}: object {min(unknown)!r:.40} is not one of VOC's {len(VOC) - 1} classes")
    return tuple(sorted(VOC.index(name) for name in names))
