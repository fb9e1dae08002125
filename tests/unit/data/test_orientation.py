"""Turning images upright, compared with Pillow."""

from __future__ import annotations

import io

import numpy as np
import pytest
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


@pytest.mark.parametrize("orientation", [0, 9, "6"])
def test_an_orientation_that_does_not_exist_counts_as_none(orientation):
    image = Image.new("RGB", (W, H))
    image.getexif()[ExifTags.Base.Orientation] = orientation
    assert orientation_of(image) == 1
