"""EXIF orientation: how the stored pixels of an image are turned to be upright.

Orientation 1 is upright; 5 to 8 exchange height and width. (Exif 2.32, tag Orientation.)
"""

from __future__ import annotations

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
    """Return the EXIF orientation, 1 to 8, of an opened image; 1 where it has none, or one that does not exist."""
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in _TURNS else 1


def turned_size(size_HW: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Return the upright (H, W) of an image of the stored (H, W), or the stored of the upright."""
    return size_HW[::-1] if _TURNS[orientation][0] else size_HW


def turn(pixels_HW: np.ndarray, orientation: int) -> np.ndarray:
    """Return stored pixels, H x W or H x W x C, turned upright, as PIL.ImageOps.exif_transpose does."""
    transpose, rows, columns = _TURNS[orientation]
    turned_HW = pixels_HW.swapaxes(0, 1) if transpose else pixels_HW
    return np.ascontiguousarray(turned_HW[:: -1 if rows else 1, :: -1 if columns else 1])
