"""Data sets in COCO's format: an instances_*.json and a directory of the images it lists.

The file's `categories` decide what an annotation is; their ids are free. COCO 2014 and 2017 are data sets of this format.
Shapes: H W image pixels.
"""

from __future__ import annotations

import json
import logging
import operator
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

from weakclip.config import STORED, BuildConfig
from weakclip.data.codecs import encode_mask_png
from weakclip.data.index import ShardError
from weakclip.data.names import composed
from weakclip.datasets.files import check_listed, find_images, name_of
from weakclip.datasets.items import Item, Listing
from weakclip.labels import COCO, find_class, nearest

_log = logging.getLogger(__name__)


def items(build: BuildConfig, target: Sequence[str]) -> Listing:
    """List the images that `build` describes; `target` is the class list of the new set."""
    found = coco_items(Path(str(build.images)), Path(str(build.annotations)), target, build.masks)
    beyond = [item.name for item in found.items if isinstance(item.mask, Instances) and not item.mask.within(item.mask.size_HW)]
    if beyond and build.exif == STORED:
        hint = "if they were drawn on photos that EXIF turns, build with --exif upright"
        _log.warning("%d images have polygons beyond their size, such as %s; %s", len(beyond), beyond[0], hint)
    return found


def coco_items(images: Path, annotations: Path, target: Sequence[str], with_masks: bool = False) -> Listing:
    """List every image of an instances file, ordered by id; its classes are those annotated in it, crowds included.

    The classes are COCO's where all annotated categories are, by name or by VOC's name for the same; otherwise those of `target`,
    which must then have all of them. Raises ShardError when it has not, when the file does not have COCO's format, and when the
    files in `images` are not those it lists.
    """
    found = read_instances(annotations)
    names = [_name_in(image) for image in found.images]
    present = find_images(images, recursive=any("/" in name for name in names))
    check_listed(present, names, images, annotations)
    own = COCO if all(find_class(name, COCO) for name in found.annotated) else tuple(target)
    used = {category: name for category, name in found.categories.items() if name in found.annotated}
    index_of = {category: _index(name, own, annotations) for category, name in used.items()}
    listed = []
    for image in sorted(found.images, key=operator.itemgetter("id")):
        path, size_HW = present[_name_in(image)], (image["height"], image["width"])
        segments = tuple((index_of[category], drawn) for category, drawn in found.segments[image["id"]])
        classes = tuple(sorted({index for index, _ in segments}))
        name = name_of(path, images)
        mask = Instances(name, size_HW, segments) if with_masks else None
        listed.append(Item(name, path, classes, mask=mask, size_HW=size_HW))
    return Listing(own, listed)


def _name_in(image: dict[str, Any]) -> str:
    """Return the composed path of a listed image below the folder of images."""
    return composed(posixpath.normpath(image["file_name"]))


def own_classes(annotations: Path) -> tuple[str, ...]:
    """Return "background" and the names of a file's annotated categories, ordered by id. Raises ShardError as `coco_items`."""
    found = read_instances(annotations)
    names = [name for _, name in sorted(found.categories.items()) if name in found.annotated]
    return ("background", *dict.fromkeys(names))


def _index(name: str, own: Sequence[str], file: Path) -> int:
    if index := find_class(name, own):
        return index
    raise ShardError(
        f"{file}: category {name!r} is not in the class list (nearest: {nearest(name, own)!r}); give a list that has it, or take "
        "the file's own categories with --classes from-annotations"
    )


class _Found(NamedTuple):
    """What an instances file holds."""

    images: list[dict[str, Any]]
    categories: dict[int, str]
    """Names by id."""
    annotated: set[str]
    """Names of the categories that have annotations."""
    segments: dict[int, list[tuple[int, Any]]]
    """Category id and segmentation of each annotation, by image id."""


_IMAGE = {"id": int, "file_name": str, "height": int, "width": int}
_CATEGORY = {"id": int, "name": str}
_ANNOTATION = {"image_id": int, "category_id": int}


def read_instances(file: Path) -> _Found:
    """Read an instances file. Raises ShardError when it does not have COCO's format."""
    try:
        raw = json.loads(file.read_bytes())
        images, categories = _typed(raw["images"], _IMAGE), _typed(raw["categories"], _CATEGORY)
        annotations = _typed(raw["annotations"], _ANNOTATION)
        drawn = [annotation["segmentation"] for annotation in raw["annotations"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"{file}: not a COCO instances file ({type(error).__name__}: {error})") from None
    names = {category["id"]: category["name"].strip() for category in categories}
    segments: dict[int, list[tuple[int, Any]]] = {image["id"]: [] for image in images}
    for what, ids, rows in (("images", segments, images), ("categories", names, categories)):
        if len(ids) < len(rows):
            raise ShardError(f"{file}: two {what} have the same id")
    for annotation, segmentation in zip(annotations, drawn, strict=True):
        if (category := annotation["category_id"]) not in names:
            raise ShardError(f"{file}: category_id {category} is not listed under 'categories'")
        if (image := annotation["image_id"]) not in segments:
            raise ShardError(f"{file}: annotations of image {image}, which is not listed under 'images'")
        segments[image].append((category, segmentation))
    annotated = {names[category] for found in segments.values() for category, _ in found}
    return _Found(images, names, annotated, segments)


def _typed(rows: Iterable[Any], kinds: Mapping[str, type]) -> list[dict[str, Any]]:
    """Return these keys of each row. Raises KeyError or TypeError when one is missing or has another type, such as an id "7"."""
    found = [{name: row[name] for name in kinds} for row in rows]
    if wrong := [row for row in found if any(type(row[name]) is not kind for name, kind in kinds.items())]:
        expected = ", ".join(f"{name} {kind.__name__}" for name, kind in kinds.items())
        raise TypeError(f"{wrong[0]}; expected: {expected}")
    return found


# -------------------------------------------------------------------------------------------------------------- masks


@dataclass(frozen=True)
class Instances:
    """The instances annotated in one image, (class, COCO segmentation) pairs; `read_bytes` draws them as a mask."""

    name: str
    size_HW: tuple[int, int]
    segments: tuple[tuple[int, Any], ...]

    def read_bytes(self) -> bytes:
        """Return a PNG of class indices. Raises ShardError naming the image when a segmentation cannot be drawn."""
        return encode_mask_png(_rasterise(self.segments, *self.size_HW, self.name))

    def within(self, size_HW: tuple[int, int]) -> bool:
        """Return whether all polygons lie within an image of this size, to two pixels."""
        polygons = [corners for _, drawn in self.segments if isinstance(drawn, list) for corners in drawn]
        lists = [corners for corners in polygons if isinstance(corners, list) and corners]
        H, W = size_HW
        try:
            return all(max(corners[::2]) <= W + 2 and max(corners[1::2], default=0) <= H + 2 for corners in lists)
        except TypeError:  # not numbers: reported when it is drawn
            return True


def _rasterise(segments: Iterable[tuple[int, Any]], height: int, width: int, name: str) -> np.ndarray:
    """Return the class mask, uint8 H x W. Where instances overlap, the one with the fewest pixels wins."""
    try:
        masks = [(segment_mask(segmentation, height, width), index) for index, segmentation in segments]
    except Exception as error:  # the file may hold anything in place of a segmentation
        raise ShardError(f"{name}: a segmentation is neither polygons nor RLE of this image ({error})") from None
    mask_HW = np.zeros((height, width), np.uint8)
    for inside_HW, index in sorted(masks, key=lambda pair: -int(pair[0].sum())):
        mask_HW[inside_HW] = index
    return mask_HW


def segment_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Return bool H x W of one COCO segmentation, as pycocotools draws it: a list of polygons [x, y, x, y, ...], or
    {"size": [H, W], "counts": ...} with run lengths or their compressed form, a string. Raises ValueError or TypeError."""
    if isinstance(segmentation, dict):
        if "size" in segmentation and list(segmentation["size"]) != [height, width]:
            raise ValueError(f"size is {segmentation['size']}, but the image's [height, width] is {[height, width]}")
        counts = segmentation["counts"]
        runs = _runs(counts) if isinstance(counts, str) else [operator.index(run) for run in counts]
        rest = height * width - sum(runs)
        # As in pycocotools, what is missing in compressed RLE is background.
        if min(runs, default=0) < 0 or rest < 0 or (rest and not isinstance(counts, str)):
            raise ValueError(f"its runs cover {sum(runs)} pixels of {height * width}")
        runs += [rest] if len(runs) % 2 == 0 else [0, rest]
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    if not segmentation:
        return np.zeros((height, width), bool)
    polygons = [_polygon(corners, 10 * max(height, width)) for corners in segmentation]
    return rle.decode(rle.merge(rle.frPyObjects(polygons, height, width))).astype(bool)


def _polygon(corners: Any, limit: int) -> list[float]:
    """Return the corners of a polygon, x, y, x, y, ... Raises ValueError for fewer than three, and for corners far away."""
    points = np.asarray(corners, np.float64)
    if points.ndim != 1 or len(points) < 6 or len(points) % 2:
        raise ValueError(f"a polygon has {points.size} coordinates; it needs x, y of three corners or more")
    if not (np.abs(points) <= limit).all():  # pycocotools follows the edges pixel by pixel
        raise ValueError("a corner of a polygon is far outside the image")
    return points.tolist()


def _runs(counts: str) -> list[int]:
    """Return the run lengths that a compressed string holds: six bits a character from "0", five of them digits, low ones first.

    From the third on, a run is stored as its difference to the one before the last. (cocoapi, maskApi.c: rleFrString)
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{character!r} is no part of a compressed RLE")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) and 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("its counts are cut off")
    return runs
