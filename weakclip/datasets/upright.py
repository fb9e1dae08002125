"""Turning a data set upright: `--exif upright`. Whether a part turns with the pixels is decided here, for all images at once.

Masks, seeds and CAMs follow either the stored pixels, as programs write them, or the upright image, as people draw them. Their
sizes tell it where an image is turned by 90 degrees and not square; these images decide for all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from weakclip.data.index import ShardError
from weakclip.datasets.cam_files import read_cam
from weakclip.datasets.coco import Instances
from weakclip.datasets.items import Item
from weakclip.datasets.loading import Header, read_header

STORED, UPRIGHT = "stored", "upright"

_log = logging.getLogger(__name__)


class _Turned(NamedTuple):
    """An item whose image has an orientation other than 1."""

    item: Item
    header: Header


def turned_upright(items: Sequence[Item], cam_keys: str) -> list[Item]:
    """Return the items with the orientations by which their images, and the parts that follow the stored pixels, are turned.

    Raises ShardError naming two files where the parts of one kind follow both.
    """
    found = {}
    for item in tqdm(items, "orientations", unit=" images"):
        with open(item.image, "rb") as stream:
            found[item.name] = _Turned(item, read_header(stream, item.image))
    turned = {name: one for name, one in found.items() if one.header.orientation != 1}
    frames = {part: _frame(part, [*turned.values()], cam_keys) for part in ("mask", "seed", "cam")}
    if turned:
        told = ", ".join(f"each {part} is taken as {frame}" for part, frame in frames.items() if frame)
        _log.info("%d of %d images are turned upright by their EXIF orientation; %s", len(turned), len(items), told)
    stored = frozenset(part for part, frame in frames.items() if frame == STORED)
    return [_settled(turned[item.name], stored) if item.name in turned else item for item in items]


def _settled(turned: _Turned, stored: frozenset[str]) -> Item:
    item, header = replace(turned.item, orientation=turned.header.orientation, stored=stored), turned.header
    if item.size_HW == header.size and "mask" not in stored:  # polygons in the upright frame, listed with the stored size
        mask = replace(item.mask, size_HW=header.upright_size) if isinstance(item.mask, Instances) else item.mask
        return replace(item, size_HW=header.upright_size, mask=mask)
    return item


def _frame(part: str, turned: Sequence[_Turned], cam_keys: str) -> str | None:
    """Return which frame the parts of one kind follow, None where there are none. Where no size tells it: the stored one."""
    present = [one for one in turned if _has(part, one.item)]
    # An image may be listed with the stored size although its polygons are drawn on the upright one. Then sizes tell nothing.
    reaching = [one.item for one in present if part == "mask" and _reaches_beyond(one)]
    votes: dict[str, Item] = {UPRIGHT: reaching[0]} if reaching else {}
    for one in present if not reaching else ():
        if (vote := _vote(part, one, cam_keys)) is not None:
            votes.setdefault(vote, one.item)
    if len(votes) == 2:
        files = f"{votes[STORED].image} follows the stored pixels, that of {votes[UPRIGHT].image} the upright image"
        raise ShardError(f"--exif upright: the {part} of {files}; make all of them follow one")
    if present and not votes:
        _log.warning("--exif upright: no size tells whether a %s follows the stored pixels; each is turned with them", part)
    return next(iter(votes), STORED) if present else None


def _has(part: str, item: Item) -> bool:
    given = {"mask": item.mask or item.size_HW, "seed": item.seed, "cam": item.cam}
    return given[part] is not None


def _reaches_beyond(one: _Turned) -> bool:
    return isinstance(one.item.mask, Instances) and one.item.size_HW == one.header.size and one.item.mask.reaches_beyond()


def _vote(part: str, one: _Turned, cam_keys: str) -> str | None:
    """Return the frame that the size of a part tells, None where it fits both or neither."""
    item, header = one
    fits: Mapping[str, bool]
    if part == "cam":
        assert item.cam is not None
        frames = {STORED: header.size, UPRIGHT: header.upright_size}
        fits = {name: read_cam(item.cam, size, item.classes or (), cam_keys).fits(*size) for name, size in frames.items()}
    else:
        size_HW = _size_of(item.mask if part == "mask" else item.seed, item)
        fits = {STORED: size_HW == header.size, UPRIGHT: size_HW == header.upright_size}
    told = [name for name, does in fits.items() if does]
    return told[0] if len(told) == 1 else None


def _size_of(file: object, item: Item) -> tuple[int, int] | None:
    """Return the (H, W) of a mask's file, or that for which an image is annotated; None where it cannot be told."""
    if not isinstance(file, Path):
        return item.size_HW
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except OSError:  # a .mat, or damaged: reported when it is read
        return None
