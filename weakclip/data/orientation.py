"""EXIF orientation: how the stored pixels of an image are turned to be upright.

Orientation 1 is upright; 5 to 8 exchange height and width. (Exif 2.32, tag Orientation.)
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import ExifTags, Image

# Orientation -> (transpose, then reverse the rows, reverse the columns).
_TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, of an opened image; 1 where it has none, or one that is damaged or does not exist."""
    try:
        found = _exif_of(image).get(ExifTags.Base.Orientation, 1)
        return int(found) if found in _TURNS else 1
    except Exception:  # a reader of damaged bytes may raise anything
        return 1


def _exif_of(image: Image.Image) -> Image.Exif:
    """Return the EXIF data. Pillow decodes a PNG to look for it behind the pixels, which takes a second for a photo."""
    stream = getattr(image, "fp", None)
    if image.format != "PNG" or "exif" in image.info or stream is None:
        return image.getexif()
    found, before = Image.Exif(), stream.tell()
    stream.seek(8)
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            found.load(stream.read(length))
            break
        stream.seek(length + 4, io.SEEK_CUR)
    stream.seek(before)
    return found


def turned_size(size_HW: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return the upright (H, W) of an image of the stored (H, W), or the stored of the upright."""
    return size_HW[::-1] if _TURNS[orientation][0] else size_HW


def turn(pixels_HW: np.ndarray, orientation: int) -> np.ndarray:
    """Return stored pixels, H x W or H x W x C, turned upright, as PIL.ImageOps.exif_transpose does."""
    transpose, rows, columns = _TURNS[orientation]
    turned_HW = pixels_HW.swapaxes(0, 1) if transpose else pixels_HW
    return np.ascontiguousarray(turned_HW[:: -1 if rows else 1, :: -1 if columns else 1])
