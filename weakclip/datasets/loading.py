"""Reading the files of an item into a sample.

Shapes: H W image pixels, n maps of one image.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from weakclip.config import STORED, UPRIGHT
from weakclip.data.codecs import encode_mask_png, png_palette
from weakclip.data.index import ShardError
from weakclip.data.orientation import orientation_of, turn, turned_size
from weakclip.data.sample import IMAGES, Cam, Sample, decode_mask, proportional
from weakclip.datasets.cam_files import map_shape, read_cam
from weakclip.datasets.items import Item, Readable
from weakclip.datasets.mask_files import index_png
from weakclip.labels import IGNORE, palette


class Header(NamedTuple):
    """What the header of an image says."""

    extension: str
    """Key of weakclip.data.sample.IMAGES."""
    size: tuple[int, int]
    """H, W of the stored pixels."""
    orientation: int
    """EXIF orientation."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """H, W of the upright image."""
        return turned_size(self.size, self.orientation)


def read_header(stream: BinaryIO, file: Path) -> Header:
    """Return what the header of an image says. Raises ShardError naming `file` when it is not a JPEG, PNG or WebP."""
    if not stream.read(1):
        raise ShardError(f"{file}: is empty; copy it again")
    stream.seek(0)
    try:
        with Image.open(stream) as image:
            # A phone's photo may be an MPO: a JPEG with more of them behind it.
            found = "JPEG" if image.format == "MPO" else image.format
            size_HW, orientation = (image.height, image.width), orientation_of(image)
    except Exception:  # a decoder of damaged bytes may raise anything
        raise ShardError(f"{file}: not a JPEG, PNG or WebP image, or damaged; copy or convert it again") from None
    extension = next((extension for extension, name in IMAGES.items() if name == found), None)
    if extension is None:
        raise ShardError(f"{file}: is a {found}; convert it to PNG or JPEG, such as by: magick {file.name} {file.stem}.png")
    return Header(extension, size_HW, orientation)


def load_item(item: Item, class_map: Sequence[int], cam_keys: str = "foreground0", in_colours: bool = False) -> Sample:
    """Read the files of one item and map its classes by `class_map` (labels.class_map) to those of the set to build.

    in_colours: whether masks may be in VOC's colours, which stand for VOC's classes. Raises ShardError or OSError naming the
    file at fault.
    """
    data = item.image.read_bytes()
    header, classes = read_header(io.BytesIO(data), item.image), item.classes or ()
    if item.size_HW is not None:
        _check_frame(item.size_HW, "mask", item, header, f"{item.image}: its annotations are")
    size_HW = turned_size(header.size, item.orientation)
    sample = Sample(
        name=item.name,
        image=data,
        image_ext=header.extension,
        classes=classes,
        height=size_HW[0],
        width=size_HW[1],
        source=f"{item.image.parent.name}/{item.image.name}",
        cam=_read_cam(item, header, classes, cam_keys),
        seed=_read_mask(item, "seed", header, in_colours),
        mask=_read_mask(item, "mask", header, in_colours),
        orientation=item.orientation,
    )
    return sample if tuple(class_map) == tuple(range(len(class_map))) else _translated(sample, class_map)


def _frame_of(part: str, item: Item, header: Header) -> tuple[int, int]:
    """Return the (H, W) that a part of an item has as it is given."""
    return header.size if part in item.stored else turned_size(header.size, item.orientation)


def _check_frame(found_HW: tuple[int, int], part: str, item: Item, header: Header, what: str) -> None:
    """Raise ShardError unless a part of the size `found_HW` fits the image as it is used."""
    expected_HW = _frame_of(part, item, header)
    if found_HW != expected_HW:
        hint = _exif_hint(found_HW, item, header)
        raise ShardError(f"{what} for an image of (H, W) {found_HW}, but it is {expected_HW}{hint}")


def _exif_hint(found_HW: tuple[int, int], item: Item, header: Header) -> str:
    """Return the end of a message for a part that fits only the image's other frame."""
    other, frame_HW = (UPRIGHT, header.upright_size) if item.orientation == 1 else (STORED, header.size)
    if found_HW != frame_HW or header.size == header.upright_size:
        return ""
    return f", which has EXIF orientation {header.orientation}: the size is that of the other frame; build with --exif {other}"


def _read_mask(item: Item, part: str, header: Header, in_colours: bool) -> bytes | None:
    """Return a mask as a PNG of class indices in the image's frame."""
    file = item.mask if part == "mask" else item.seed
    if file is None:
        return None
    where = file if isinstance(file, Path) else item.image
    data = index_png(_drawn(file, header), str(where), in_colours)
    W, H = struct.unpack(">II", data[16:24])
    _check_frame((H, W), part, item, header, f"{where}: this {part} is")
    if part not in item.stored:
        return data
    mask_HW = decode_mask(data, f"{part}.png", (H, W), num_classes=256)
    assert mask_HW is not None
    return encode_mask_png(turn(mask_HW, item.orientation), png_palette(data))


def _drawn(file: Readable, header: Header) -> bytes:
    """Return the bytes of a mask. Where annotations cannot be drawn on an image that EXIF turns, the error says so."""
    try:
        return file.read_bytes()
    except ShardError as error:
        if header.orientation == 1:
            raise
        raise ShardError(f"{error}; the image has EXIF orientation {header.orientation}, see --exif") from None


def _read_cam(item: Item, header: Header, classes: Sequence[int], cam_keys: str) -> Cam | None:
    """Return an item's maps in the image's frame."""
    if item.cam is None:
        return None
    size_HW = _frame_of("cam", item, header)
    if header.orientation != 1:  # before small maps are enlarged to the image's proportions
        shape_hw = map_shape(item.cam)
        if not proportional(shape_hw, size_HW) and proportional(shape_hw, size_HW[::-1]):
            hint = _exif_hint(size_HW[::-1], item, header)
            raise ShardError(f"{item.cam}: maps of {shape_hw} do not fit an image of {size_HW}{hint}")
    cam = read_cam(item.cam, size_HW, classes, cam_keys)
    if "cam" not in item.stored:
        return cam
    return replace(cam, maps_nhw=np.stack([turn(map_hw, item.orientation) for map_hw in cam.maps_nhw]))


def _permuted(colours: bytes | None, class_map: Sequence[int]) -> bytes | None:
    """Return the palette in which each class keeps its colour under its new index."""
    if colours is None:
        return None
    permuted = bytearray(palette())
    for index, target in enumerate(class_map):
        if target and 3 * index < len(colours):
            permuted[3 * target : 3 * target + 3] = colours[3 * index : 3 * index + 3]
    return bytes(permuted)


def _translated(sample: Sample, class_map: Sequence[int]) -> Sample:
    """Map a sample to another class list: c becomes class_map[c]; 0 is dropped from labels and CAMs, but kept in masks."""
    lut = np.full(256, IGNORE, np.uint8)
    lut[: len(class_map)] = class_map

    def translated(data: bytes | None, what: str) -> bytes | None:
        mask_HW = decode_mask(data, what, sample.size, len(class_map))
        return None if data is None or mask_HW is None else encode_mask_png(lut[mask_HW], _permuted(png_palette(data), class_map))

    cam = sample.cam
    if cam:
        kept = sorted((class_map[index], n) for n, index in enumerate(cam.classes) if class_map[index])
        cam = Cam(tuple(index for index, _ in kept), cam.maps_nhw[[n for _, n in kept]], cam.scale)
    classes = tuple(sorted({class_map[index] for index in sample.classes} - {0}))
    try:
        seed, mask = translated(sample.seed, "seed.png"), translated(sample.mask, "mask.png")
    except ShardError as error:
        raise ShardError(f"{sample.source}: {error}") from None
    return replace(sample, classes=classes, cam=cam, seed=seed, mask=mask)
