"""Fast codecs for the usual kinds of image. The decoders return None for anything unusual, which the caller leaves to Pillow.

Where they do decode, the pixels are the same as Pillow's.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image
from zlib_ng import zlib_ng

from weakclip.labels import palette

_PNG = b"\x89PNG\r\n\x1a\n"


def decode_jpeg(data: bytes, size: tuple[int, int], least: tuple[int, int]) -> np.ndarray | None:
    """Decode a JPEG of H, W = `size` to uint8 RGB, reduced to 1/2, 3/8, 1/4 or 1/8 where that is still `least` or more.

    libjpeg-turbo decodes it. Return None for another size, CMYK, damage, and what Pillow would call a decompression bomb.
    """
    if not 0 < math.prod(size) <= (Image.MAX_IMAGE_PIXELS or math.inf):
        return None
    if min(size) < 16:  # the size of a tiny result does not tell how much it was reduced
        least = size
    try:
        *header_HW, colours, _ = simplejpeg.decode_jpeg_header(data)
        if tuple(header_HW) != size or colours in ("CMYK", "YCCK"):
            return None
        return simplejpeg.decode_jpeg(data, min_height=least[0], min_width=least[1], min_factor=2)
    except Exception:  # a decoder of damaged bytes may raise anything
        return None


def decode_mask_png(data: bytes, size: tuple[int, int]) -> np.ndarray | None:
    """Decode an 8-bit grey or palette PNG of H, W = `size` to its grey values or indices, uint8 H x W.

    Return None for another kind or size, damage, and filtered rows, which Pillow does not write for palettes.
    """
    H, W = size
    try:
        chunks = [*_png_chunks(data)]
        kinds = [kind for kind, _ in chunks]
        if kinds[0] != b"IHDR" or chunks[0][1] not in [struct.pack(">IIBBBBB", W, H, 8, kind, 0, 0, 0) for kind in (0, 3)]:
            return None
        inflate = zlib_ng.decompressobj()
        pixels = inflate.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"), H * (W + 1) + 1)
        rows = np.frombuffer(pixels, np.uint8).reshape(H, W + 1)
    except Exception:  # damaged bytes may raise anything
        return None
    return None if rows[:, 0].any() or not inflate.eof else rows[:, 1:].copy()


def png_palette(data: bytes) -> bytes | None:
    """Return the palette of an intact PNG, three bytes a colour; None where it has none. It lies before the pixels."""
    at, kind = len(_PNG), b""
    while kind not in (b"PLTE", b"IDAT", b"IEND"):
        length, kind = struct.unpack_from(">I4s", data, at)
        at += 12 + length
    return data[at - 4 - length : at - 4] if kind == b"PLTE" else None


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and contents of the chunks up to the end mark. Raises ValueError or struct.error if one is not intact."""
    if not data.startswith(_PNG):
        raise ValueError
    at, kind = len(_PNG), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        if struct.unpack_from(">I", data, at + 8 + length)[0] != zlib_ng.crc32(body, zlib_ng.crc32(kind)):
            raise ValueError
        yield kind, body
        at += 12 + length


def encode_mask_png(mask_HW: np.ndarray, colours: bytes | None = None) -> bytes:
    """Return a mask of class indices, uint8 H x W, as an 8-bit palette PNG.

    colours: the palette, three bytes a colour; None: PASCAL VOC's.
    """
    image = Image.fromarray(mask_HW)
    image.putpalette(palette() if colours is None else colours)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
