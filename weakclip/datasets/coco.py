"""COCO 2014 or 2017 in its usual layout: an instances_*.json and a directory of the images it lists.

Shapes: H W image pixels.
"""

from __future__ import annotations

import json
import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weakclip.config import BuildConfig
from weakclip.data.codecs import encode_mask_png
from weakclip.data.index import ShardError
from weakclip.datasets.items import Item, check_files
from weakclip.labels import COCO_ID_TO_CLASS


def items(build: BuildConfig, names: Sequence[str]) -> list[Item]:
    """List the images that `build` describes; `names` is the class list of its labels."""
    return coco_items(Path(str(build.images)), Path(str(build.annotations)), build.masks)


def coco_items(images: Path, annotations: Path, with_masks: bool = False) -> list[Item]:
    """List every image of a COCO instances file, ordered by id; its classes are those annotated in it, crowds included.

    Raises ShardError when the annotations are not COCO's, and when the files in `images` are not those they list.
    """
    listed, segments = _read_instances(annotations)
    check_files(images, [image["file_name"] for image in listed], annotations)
    items = []
    for image in sorted(listed, key=operator.itemgetter("id")):
        key, size_HW = Path(image["file_name"]).stem, (image["height"], image["width"])
        found = tuple(segments.get(image["id"], ()))
        classes = tuple(sorted({index for index, _ in found}))
        mask = Instances(key, size_HW, found) if with_masks else None
        items.append(Item(key, images / image["file_name"], classes, mask=mask, size_HW=size_HW))
    return items


_IMAGE = {"id": int, "file_name": str, "height": int, "width": int}


def _read_instances(file: Path) -> tuple[list[dict[str, Any]], dict[int, list[tuple[int, Any]]]]:
    """Return the images of an instances file, and their (class index, segmentation) pairs by image id."""
    segments = defaultdict(list)
    try:
        raw = json.loads(file.read_bytes())
        images = [{name: image[name] for name in _IMAGE} for image in raw["images"]]
        if wrong := [image for image in images if any(type(image[name]) is not kind for name, kind in _IMAGE.items())]:
            raise TypeError(f"image {wrong[0]}")
        for annotation in raw["annotations"]:
            if (category := annotation["category_id"]) not in COCO_ID_TO_CLASS:
                raise ShardError(f"{file}: category_id {category!r} is not one of COCO's 80 thing classes")
            segments[annotation["image_id"]].append((COCO_ID_TO_CLASS[category], annotation["segmentation"]))
        ids = {image["id"] for image in images}
    except ShardError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"{file}: not a COCO instances file ({type(error).__name__}: {error})") from None
    if len(ids) < len(images):
        raise ShardError(f"{file}: two images have the same id")
    if unknown := segments.keys() - ids:
        raise ShardError(f"{file}: annotations of image {min(unknown, key=str)}, which is not listed under 'images'")
    return images, segments


# -------------------------------------------------------------------------------------------------------------- masks


@dataclass(frozen=True)
class Instances:
    """The instances annotated in one image, (class, COCO segmentation) pairs; `read_bytes` draws them as a mask."""

    key: str
    size_HW: tuple[int, int]
    segments: tuple[tuple[int, Any], ...]

    def read_bytes(self) -> bytes:
        """Return a PNG of class indices. Raises ShardError naming the key when a segmentation cannot be drawn."""
        return encode_mask_png(_rasterise(self.segments, *self.size_HW, self.key))


def _rasterise(segments: Iterable[tuple[int, Any]], height: int, width: int, key: str) -> np.ndarray:
    """Return the class mask, uint8 H x W. Where instances overlap, the one with the fewest pixels wins."""
    try:
        masks = [(_segment_mask(segmentation, height, width), index) for index, segmentation in segments]
    except Exception as error:  # the file may hold anything in place of a segmentation
        raise ShardError(f"{key}: a segmentation is neither polygons nor RLE with list counts ({error})") from None
    mask_HW = np.zeros((height, width), np.uint8)
    for inside_HW, index in sorted(masks, key=lambda pair: -int(pair[0].sum())):
        mask_HW[inside_HW] = index
    return mask_HW


def _segment_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Return bool H x W of one COCO segmentation: a list of polygons [x, y, x, y, ...] or {"counts": run lengths}."""
    if isinstance(segmentation, dict):
        runs = np.array(segmentation["counts"], np.int64)  # raises ValueError for the compressed form, a string
        if runs.sum() != height * width:  # checked first, since it may claim gigabytes
            raise ValueError(f"{runs.sum()} pixels of {height * width}")
        values = np.arange(len(runs)) % 2 == 1
        return np.repeat(values, runs).reshape(width, height).T  # runs go down the columns
    inside_HW = np.zeros((height, width), bool)
    for polygon in segmentation:
        inside_HW |= _polygon_mask(np.array(polygon, np.float64).reshape(-1, 2), height, width)
    return inside_HW


def _polygon_mask(points_n2: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return bool H x W: the pixels whose centre lies inside the polygon, by the even-odd rule."""
    if not np.isfinite(points_n2).all():
        raise ValueError("a corner is not finite")
    x0, y0 = points_n2.T
    x1, y1 = np.roll(points_n2, -1, axis=0).T
    # An edge crosses the centre lines of rows top .. bottom - 1.
    top = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), 0, height).astype(int)
    bottom = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), 0, height).astype(int)
    count = bottom - top
    edge = np.repeat(np.arange(len(points_n2)), count)
    row = np.arange(count.sum()) + np.repeat(top - (count.cumsum() - count), count)
    x = x0[edge] + (row + 0.5 - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(int)
    crossings_HW = np.zeros((height, width + 1), np.uint8)
    np.add.at(crossings_HW, (row, column), 1)
    return (crossings_HW.cumsum(axis=1, dtype=np.uint8)[:, :width] & 1).astype(bool)
