"""Turning a data set upright: `--exif upright`. Whether a part turns with the pixels is decided here, for all images at once.

Masks, seeds and CAMs follow either the stored pixels, as programs write them, or the upright image, as people draw them. Where an
image is turned by 90 degrees and is not square, the size of a part shows which. Such images decide for the others.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from weakclip.config import STORED, UPRIGHT
from weakclip.data.index import ShardError
from weakclip.data.sample import proportional
from weakclip.datasets.cam_files import map_shape
from weakclip.datasets.coco import Instances
from weakclip.datasets.items import Item
from weakclip.datasets.loading import Header, read_header

_log = logging.getLogger(__name__)


class _Turned(NamedTuple):
    """An item whose image has an orientation other than 1."""

    item: Item
    header: Header


def turned_upright(items: Sequence[Item]) -> list[Item]:
    """Return the items with the orientations by which their images, and the parts that follow the stored pixels, are turned.

    Raises ShardError naming two images where the parts of one kind follow both.
    """
    turned = {}
    for item in tqdm(items, "orientations", unit=" images", disable=None):
        with open(item.image, "rb") as stream:
            header = read_header(stream, item.image)
        if header.orientation != 1:
            turned[item.name] = _Turned(item, header)
    frames = {part: frame for part in ("mask", "seed", "cam") if (frame := _frame(part, [*turned.values()]))}
    if turned:
        follow = "".join(f"; each {part} follows the {frame} image" for part, frame in frames.items())
        _log.info("%d of %d images are turned upright by their EXIF orientation%s", len(turned), len(items), follow)
    stored = tuple(part for part, frame in frames.items() if frame == STORED)
    return [_with_orientation(turned[item.name], stored) if item.name in turned else item for item in items]


def _with_orientation(turned: _Turned, stored: tuple[str, ...]) -> Item:
    item, header = replace(turned.item, orientation=turned.header.orientation, stored=stored), turned.header
    if item.size_HW == header.size and "mask" not in stored:  # polygons in the upright frame, listed with the stored size
        mask = replace(item.mask, size_HW=header.upright_size) if isinstance(item.mask, Instances) else item.mask
        return replace(item, size_HW=header.upright_size, mask=mask)
    return item


def _frame(part: str, turned: Sequence[_Turned]) -> str | None:
    """Return which frame the parts of one kind follow, None where there are none. Where nothing shows it: the stored one."""
    present = [one for one in turned if _has(part, one.item)]
    votes: dict[str, Item] = {}
    for one in present:
        if (vote := _vote(part, one)) is not None:
            votes.setdefault(vote, one.item)
    if len(votes) == 2:
        both = f"that of {votes[STORED].image} follows the stored pixels, that of {votes[UPRIGHT].image} the upright image"
        raise ShardError(f"--exif upright: two kinds of {part}: {both}; make all of them follow one")
    if present and not votes and not any(one.item.size_HW for one in present if part == "mask"):
        _log.warning(
            "--exif upright: the sizes do not show whether each %s follows the stored pixels; it is turned with them", part
        )
    return next(iter(votes), STORED) if present else None


def _has(part: str, item: Item) -> bool:
    given = {"mask": item.mask or item.size_HW, "seed": item.seed, "cam": item.cam}
    return given[part] is not None


def _vote(part: str, one: _Turned) -> str | None:
    """Return the frame that a part fits, None where it fits both or neither."""
    item, header = one
    frames = {STORED: header.size, UPRIGHT: header.upright_size}
    fits: Mapping[str, bool]
    if part == "cam":
        assert item.cam is not None
        shape_hw = map_shape(item.cam)
        fits = {name: proportional(shape_hw, size) for name, size in frames.items()}
    elif part == "mask" and item.size_HW == header.size and isinstance(item.mask, Instances):
        # Label Studio lists the stored size although its polygons are drawn on the upright image.
        fits = {name: item.mask.within(size) for name, size in frames.items()}
    else:
        size_HW = _size_of(item.mask if part == "mask" else item.seed, item)
        fits = {name: size_HW == size for name, size in frames.items()}
    fitting = [name for name, does in fits.items() if does]
    return fitting[0] if len(fitting) == 1 and header.size != header.upright_size else None


def _size_of(file: object, item: Item) -> tuple[int, int] | None:
    """Return the (H, W) of a mask's file, or that for which an image is annotated; None where it cannot be read."""
    if not isinstance(file, Path):
        return item.size_HW
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except OSError:  # a .mat, or damaged: reported when it is read
        return None
