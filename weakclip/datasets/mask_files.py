"""Masks as data sets store them: index PNGs of 8 or 16 bits, PASCAL VOC's colours, and SBD's .mat files."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from weakclip.data.codecs import encode_mask_png
from weakclip.data.index import ShardError
from weakclip.labels import IGNORE, palette
from weakclip.registry import load

_MATLAB = b"MATLAB 5.0"


def index_png(data: bytes, where: str, in_colours: bool = True) -> bytes:
    """Return a mask as a PNG of class indices: an 8-bit PNG unchanged, or what it is converted to.

    in_colours: whether colours stand for VOC's classes, by VOC's palette. Raises ShardError naming `where` for what is neither a
    PNG nor a .mat of SBD, for other colours, and for an index above 255.
    """
    if data.startswith(_MATLAB):
        return _grey(_segmentation(data, where))
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.mode in ("P", "L"):
                return data
            if image.mode in ("RGB", "RGBA") and in_colours:
                return encode_mask_png(_indices_of_colours(np.array(image), where))
            if image.mode.startswith("I"):
                return _grey(_eight_bits(np.array(image), where))
            raise ShardError(f"{where}: a mask of mode {image.mode}; save class indices, not colours, as an 8-bit PNG")
    except ShardError:
        raise
    except Exception as error:  # a decoder of damaged bytes may raise anything
        raise ShardError(f"{where}: not a PNG of class indices ({type(error).__name__})") from None


def _grey(mask_HW: np.ndarray) -> bytes:
    """Return a mask as a PNG without a palette, which could be taken for the source's."""
    file = io.BytesIO()
    Image.fromarray(mask_HW).save(file, "PNG")
    return file.getvalue()


def _indices_of_colours(pixels_HWC: np.ndarray, where: str) -> np.ndarray:
    """Return the class indices, uint8 H x W, of pixels in VOC's colours, RGB or opaque RGBA."""
    if pixels_HWC.shape[2] == 4 and (pixels_HWC[..., 3] != 255).any():
        raise ShardError(f"{where}: a mask with transparent pixels; save class indices as an 8-bit PNG")
    codes_HW = pixels_HWC[..., :3].astype(np.int64) @ (1 << 16, 1 << 8, 1)
    codes_n = np.array(palette()).reshape(256, 3) @ (1 << 16, 1 << 8, 1)
    order_n = codes_n.argsort()
    found_HW = order_n[np.searchsorted(codes_n, codes_HW, sorter=order_n).clip(max=255)]
    if (unknown_HW := codes_n[found_HW] != codes_HW).any():
        colour = tuple(pixels_HWC[unknown_HW][0, :3].tolist())
        raise ShardError(f"{where}: colour {colour} is not in PASCAL VOC's palette; save class indices as an 8-bit PNG")
    return found_HW.astype(np.uint8)


def _eight_bits(mask_HW: np.ndarray, where: str) -> np.ndarray:
    """Return a 16-bit mask of class indices as uint8."""
    if mask_HW.max() > IGNORE:
        raise ShardError(f"{where}: a 16-bit mask that holds {mask_HW.max()}; class indices are 0 to {IGNORE}")
    return mask_HW.astype(np.uint8)


def _segmentation(data: bytes, where: str) -> np.ndarray:
    """Return the class indices, uint8 H x W, in a .mat of SBD (Hariharan et al., ICCV 2011): GTcls.Segmentation."""
    try:
        loadmat = load("scipy.io:loadmat")
    except ImportError:
        raise ShardError(f"{where}: reading SBD's .mat files needs scipy; run: pip install 'weakclip[sbd]'") from None
    try:
        mask_HW = loadmat(io.BytesIO(data))["GTcls"][0, 0]["Segmentation"]
        if mask_HW.dtype != np.uint8 or mask_HW.ndim != 2:
            raise ValueError(f"GTcls.Segmentation is {mask_HW.dtype} of shape {mask_HW.shape}")
    except Exception as error:  # a reader of damaged bytes may raise anything
        raise ShardError(f"{where}: not a .mat of SBD with GTcls.Segmentation ({type(error).__name__}: {error})") from None
    return mask_HW
