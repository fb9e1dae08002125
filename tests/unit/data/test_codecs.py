"""Fast decoders give Pillow's pixels, or None."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from weakclip.data.codecs import decode_jpeg, decode_mask_png

SPOTS = np.random.default_rng(0).integers(0, 256, (20, 26, 3), np.uint8).repeat(4, 0).repeat(4, 1)
H, W = SIZE = SPOTS.shape[:2]
MASK = np.random.default_rng(1).choice(np.array([0, 1, 80, 255], np.uint8), (H, W))


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(buffer, kind, **options)
    return buffer.getvalue()


def palette_png(mask_HW: np.ndarray, **options) -> bytes:
    picture = Image.fromarray(mask_HW)
    picture.putpalette(list(range(256)) * 3)
    return encoded(picture, "PNG", **options)


def by_pillow(data: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


# ---------------------------------------------------------------------------------------------------------------- JPEG


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 15}, {"restart_marker_blocks": 3}], ids=str)
@pytest.mark.parametrize("size", [(H, W), (H - 3, W - 5), (1, 1), (1, 50), (17, 1)])
def test_jpegs_have_pillows_pixels(subsampling, options, size):
    data = encoded(SPOTS[: size[0], : size[1]], "JPEG", subsampling=subsampling, **options)
    np.testing.assert_array_equal(decode_jpeg(data, size, size), by_pillow(data))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_and_rgb_jpegs_have_pillows_pixels(mode):
    data = encoded(Image.fromarray(SPOTS).convert(mode), "JPEG", keep_rgb=True)
    np.testing.assert_array_equal(decode_jpeg(data, SIZE, SIZE), by_pillow(data))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([{}, {"progressive": True}, {"restart_marker_blocks": 3}]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=3),
    st.floats(0, 1),
)
def test_a_damaged_jpeg_has_pillows_pixels_or_is_left_to_it(options, changes, whole):
    """Some bytes changed, and cut off after a share `whole` of it."""
    data = bytearray(encoded(SPOTS, "JPEG", **options))
    for place, value in changes:
        data[int(place * len(data))] = value
    data = bytes(data[: round(whole * len(data))])
    pixels = decode_jpeg(data, SIZE, SIZE)
    if pixels is not None:
        np.testing.assert_array_equal(pixels, by_pillow(data))  # a failure here accepted an image that Pillow refuses


def test_real_jpegs_have_pillows_pixels(coco_mini):
    for path in sorted((coco_mini / "val2014").iterdir())[:15]:
        data, want = path.read_bytes(), by_pillow(path.read_bytes())
        np.testing.assert_array_equal(decode_jpeg(data, want.shape[:2], want.shape[:2]), want)


@pytest.mark.parametrize(
    "factor, eighths",
    [(1, 8), (0.9, 8), (0.51, 8), (0.5, 4), (0.4, 4), (0.375, 3), (0.26, 3), (0.25, 2), (0.2, 2), (0.125, 1), (0.01, 1)],
)
def test_a_jpeg_is_reduced_so_far_that_enough_is_left(factor, eighths):
    height, width = 160, 1600
    data = encoded(Image.new("RGB", (width, height), (200, 30, 40)), "JPEG", quality=95)
    found = decode_jpeg(data, (height, width), (round(factor * height), round(factor * width)))
    assert found.shape == (height * eighths // 8, width * eighths // 8, 3)
    assert np.abs(found.astype(int) - (200, 30, 40)).max() <= 2


def test_tiny_jpegs_are_not_reduced():
    data = encoded(SPOTS[:9, :100], "JPEG")
    assert decode_jpeg(data, (9, 100), (1, 2)).shape == (9, 100, 3)


@pytest.mark.parametrize(
    "data, size",
    [
        (encoded(SPOTS, "JPEG"), (H, W + 1)),
        (encoded(SPOTS, "JPEG"), (10**6, 10**6)),
        (encoded(SPOTS, "JPEG"), (0, 0)),
        (encoded(SPOTS, "JPEG"), (-H, -W)),
        (encoded(SPOTS, "JPEG")[:-2], SIZE),
        (encoded(SPOTS, "JPEG")[:-600], SIZE),
        (encoded(Image.new("CMYK", (W, H)), "JPEG"), SIZE),
        (encoded(SPOTS, "PNG"), SIZE),
        (b"", SIZE),
    ],
    ids=["another size", "larger than allowed", "no size", "negative", "no end", "truncated", "CMYK", "PNG", "nothing"],
)
def test_other_jpegs_are_left_to_pillow(data, size):
    assert decode_jpeg(data, size, size) is None


def test_a_decompression_bomb_is_left_to_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", H * W - 1)
    assert decode_jpeg(encoded(SPOTS, "JPEG"), SIZE, SIZE) is None


# ----------------------------------------------------------------------------------------------------------------- PNG


@pytest.mark.parametrize("size", [(H, W), (1, 1), (1, 60), (50, 1)])
def test_palette_masks_have_pillows_indices(size):
    data = palette_png(np.ascontiguousarray(MASK[: size[0], : size[1]]))
    found = decode_mask_png(data, size)
    np.testing.assert_array_equal(found, MASK[: size[0], : size[1]])
    assert found.flags.writeable and found.flags.c_contiguous


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def handmade(pixels: bytes, cut: int = 10**9, header: tuple[int, ...] = (W, H, 8, 0, 0, 0, 0), end: bool = True) -> bytes:
    """A PNG of filtered rows `pixels`, its compressed data in chunks of `cut` bytes."""
    packed = zlib.compress(pixels)
    parts = [chunk(b"IDAT", packed[start : start + cut]) for start in range(0, len(packed), cut)]
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", *header))
    return head + b"".join(parts) + (chunk(b"IEND", b"") if end else b"")


ROWS = np.pad(MASK, ((0, 0), (1, 0))).tobytes()


@pytest.mark.parametrize("cut", [10**9, 7])
def test_grey_masks_without_filters_are_decoded_however_they_are_cut(cut):
    np.testing.assert_array_equal(decode_mask_png(handmade(ROWS, cut), SIZE), MASK)


@pytest.mark.parametrize(
    "data",
    [
        encoded(MASK, "PNG"),  # Pillow filters greys
        palette_png(MASK % 16, bits=4),
        encoded(MASK.astype(np.uint16), "PNG"),
        encoded(SPOTS, "PNG"),
        handmade(ROWS, header=(W, H, 8, 0, 0, 0, 1)),
        handmade(ROWS, header=(W, H + 1, 8, 0, 0, 0, 0)),
        handmade(ROWS, end=False),
        handmade(ROWS[:-1]),
        handmade(ROWS + b"\0"),
        handmade(ROWS + bytes(10**7)),
        handmade(ROWS)[:-30],
        handmade(ROWS).replace(b"IDAT", b"JDAT"),
        b"",
        encoded(SPOTS, "JPEG"),
    ],
    ids=["filtered", "4 bits", "16 bits", "colour", "interlaced", "another size", "no end mark", "too short", "too long", "bomb",
         "truncated", "checksum", "nothing", "JPEG"],
)  # fmt: skip
def test_other_masks_are_left_to_pillow(data):
    assert decode_mask_png(data, SIZE) is None


@settings(max_examples=200, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_changed_byte_of_a_mask_is_noticed(place, value):
    data = bytearray(palette_png(MASK))
    data[int(place * len(data))] = value
    found = decode_mask_png(bytes(data), SIZE)
    assert found is None or (found == MASK).all()
