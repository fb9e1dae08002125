"""Turning images upright, compared with Pillow."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from weakclip.data.orientation import orientation_of, turn, turned_size

H, W = 4, 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_are_turned_as_pillow_does(orientation, kind):
    stored = Image.fromarray(np.arange(H * W * 3, dtype=np.uint8).reshape(H, W, 3))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    stored.save(file, kind, exif=exif)
    with Image.open(file) as opened:
        assert orientation_of(opened) == orientation
        want = np.asarray(ImageOps.exif_transpose(opened))
        got = turn(np.asarray(opened), orientation)
    np.testing.assert_array_equal(got, want)
    assert got.shape[:2] == turned_size((H, W), orientation) and got.flags.c_contiguous
    assert turned_size(got.shape[:2], orientation) == (H, W)


def test_a_png_is_not_decoded_and_exif_behind_its_pixels_is_found():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    Image.fromarray(np.zeros((H, W, 3), np.uint8)).save(file, "PNG")
    data, body = file.getvalue(), exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = len(body).to_bytes(4, "big") + b"eXIf" + body
    chunk += zlib.crc32(b"eXIf" + body).to_bytes(4, "big")
    with Image.open(io.BytesIO(data[:-12] + chunk + data[-12:])) as image:
        assert orientation_of(image) == 6
        assert np.asarray(image).shape == (H, W, 3)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.binary(max_size=60))
def test_a_damaged_block_counts_as_none(kind, block):
    file = io.BytesIO()
    Image.new("RGB", (W, H)).save(file, kind, exif=b"Exif\0\0" + block)
    with Image.open(file) as image:
        assert orientation_of(image) in range(1, 9)


@pytest.mark.parametrize("orientation", [0, 9, "6"])
def test_an_orientation_that_does_not_exist_counts_as_none(orientation):
    image = Image.new("RGB", (W, H))
    image.getexif()[ExifTags.Base.Orientation] = orientation
    assert orientation_of(image) == 1
