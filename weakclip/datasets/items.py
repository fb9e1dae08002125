"""Data sets as lists of items, and reading an item into a sample: shared by coco.py, voc.py and folder.py.

Shapes: H W image pixels, n maps of one image.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from weakclip.data.codecs import encode_mask_png
from weakclip.data.index import ShardError
from weakclip.data.sample import Cam, Sample, decode_mask
from weakclip.datasets.cam_files import read_cam
from weakclip.labels import IGNORE

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_PNG = b"\x89PNG\r\n\x1a\n"


class Readable(Protocol):
    """A file, or an object that produces the bytes of one."""

    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class Item:
    """One image of a data set and the files of its parts.

    classes: indices in the data set's own class list; None where there are no labels, as for test images. mask: an 8-bit PNG of
    such indices. size_HW: the (H, W) that the annotations are for, None if they do not give it.
    """

    key: str
    image: Path
    classes: tuple[int, ...] | None
    cam: Path | None = None
    seed: Path | None = None
    mask: Readable | None = None
    size_HW: tuple[int, int] | None = None


class Listing(NamedTuple):
    """The images of a data set."""

    classes: Sequence[str]
    """The class list of their labels, masks and CAMs."""
    items: list[Item]


# ------------------------------------------------------------------------------------------------------------- listing


def image_names(directory: Path) -> set[str]:
    """Return the names of the JPEG and PNG files in a directory, recognised by their suffix."""
    return {path.name for path in directory.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}


def check_files(directory: Path, names: Collection[str], listing: Path) -> None:
    """Raise ShardError unless the images in `directory` are exactly `names`, as the file `listing` lists them."""
    present, listed = image_names(directory), set(names)
    if missing := listed - present:
        raise ShardError(f"{directory / min(missing)}: no such JPEG or PNG image{_more(missing)}, but {listing} lists it")
    if unlisted := present - listed:
        raise ShardError(f"{directory / min(unlisted)}: {listing} does not list this image{_more(unlisted)}")


def _more(names: Collection[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def labelled(items: Sequence[Item], class_map: Sequence[int]) -> list[Item]:
    """Return the items that keep a label after `class_map`, and those of unlabelled sets (classes: None).

    Raises ShardError when two items have the same key, which is the image's file name without its suffix.
    """
    counts = Counter(item.key for item in items)
    if twice := next((item for item in items if counts[item.key] > 1), None):
        raise ShardError(f"{twice.image}: {counts[twice.key]} images are called {twice.key!r}; rename or drop all but one")
    return [item for item in items if item.classes is None or any(class_map[index] for index in item.classes)]


def with_cams(items: Sequence[Item], directory: Path) -> list[Item]:
    """Return the items with their KEY.npy or KEY.npz (maps) and KEY.png (a seed mask) in `directory`; each has at least one.

    Raises ShardError where there is neither, where there are two files of maps, and for an image without labels.
    """
    names = {path.name for path in directory.iterdir()}
    return [_with_cam(item, directory, names) for item in items]


def _with_cam(item: Item, directory: Path, names: set[str]) -> Item:
    if item.classes is None:
        raise ShardError(f"{item.image}: has no labels, but a CAM needs them; leave --cams out")
    maps = [directory / f"{item.key}{suffix}" for suffix in (".npy", ".npz") if f"{item.key}{suffix}" in names]
    seed = directory / f"{item.key}.png" if f"{item.key}.png" in names else None
    if len(maps) > 1:
        raise ShardError(f"{maps[0]}: {maps[1].name} exists too; keep one of them")
    if not maps and not seed:
        raise ShardError(f"{directory / item.key}.npy: no such file, nor .npz or .png; make the CAM of this image first")
    return replace(item, cam=maps[0] if maps else None, seed=seed)


def version(item: Item) -> str:
    """Return a string that changes when one of the item's files does. Raises OSError naming a file that is missing."""
    files = [path.stat() for path in (item.image, item.cam, item.seed, item.mask) if isinstance(path, Path)]
    return repr((item, [(file.st_size, file.st_mtime_ns) for file in files]))


# ------------------------------------------------------------------------------------------------------------- reading


def load_item(item: Item, class_map: Sequence[int], cam_keys: str = "foreground0") -> Sample:
    """Read the files of one item and map its classes by `class_map` (labels.class_map) to those of the set to build.

    Raises ShardError or OSError naming the file at fault.
    """
    data = item.image.read_bytes()
    size_HW, classes = _image_size(data, item.image), item.classes or ()
    if item.size_HW not in (None, size_HW):
        raise ShardError(f"{item.image}: its size (H, W) is {size_HW}, but its annotations are for {item.size_HW}")
    sample = Sample(
        key=item.key,
        image=data,
        image_ext="png" if data.startswith(_PNG) else "jpg",
        classes=classes,
        height=size_HW[0],
        width=size_HW[1],
        source=f"{item.image.parent.name}/{item.image.name}",
        cam=read_cam(item.cam, size_HW, classes, cam_keys) if item.cam else None,
        seed=item.seed.read_bytes() if item.seed else None,
        mask=item.mask.read_bytes() if item.mask else None,
    )
    return sample if tuple(class_map) == tuple(range(len(class_map))) else _translated(sample, class_map)


def _image_size(data: bytes, file: Path) -> tuple[int, int]:
    """Return (H, W) from the header; the rest is decoded when the whole sample is checked."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG", "PNG"]) as image:
            return image.height, image.width
    except Exception as error:  # a decoder of damaged bytes may raise anything
        raise ShardError(f"{file}: not a JPEG or PNG image ({error})") from None


def _translated(sample: Sample, class_map: Sequence[int]) -> Sample:
    """Map a sample to another class list: c becomes class_map[c]; 0 is dropped from labels and CAMs, but kept in masks."""
    lut = np.full(256, IGNORE, np.uint8)
    lut[: len(class_map)] = class_map

    def translated(data: bytes | None, what: str) -> bytes | None:
        mask_HW = decode_mask(data, what, (sample.height, sample.width), len(class_map))
        return None if mask_HW is None else encode_mask_png(lut[mask_HW])

    cam = sample.cam
    if cam:
        kept = sorted((class_map[index], n) for n, index in enumerate(cam.classes) if class_map[index])
        cam = Cam(tuple(index for index, _ in kept), cam.maps_nhw[[n for _, n in kept]], cam.scale)
    classes = tuple(sorted({class_map[index] for index in sample.classes} - {0}))
    try:
        seed, mask = translated(sample.seed, "seed.png"), translated(sample.mask, "mask.png")
    except ShardError as error:
        raise ShardError(f"{sample.source}: {sample.key}: {error}") from None
    return replace(sample, classes=classes, cam=cam, seed=seed, mask=mask)
