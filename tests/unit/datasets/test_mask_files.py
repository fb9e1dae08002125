"""Masks as data sets store them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from weakclip.data.index import ShardError
from weakclip.datasets.mask_files import index_png
from weakclip.labels import palette

MASK_HW = np.array([[0, 1, 20], [255, 15, 0]], np.uint8)
COLOURS = np.array(palette(), np.uint8).reshape(256, 3)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_colours_of_other_class_lists_are_refused():
    with pytest.raises(ShardError, match="a.png: a mask of mode RGB; save class indices, not colours"):
        index_png(encoded(Image.fromarray(COLOURS[MASK_HW])), "a.png", in_colours=False)


def indices(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(index_png(data, "a.png"))))


def sbd(mask_HW: np.ndarray) -> bytes:
    """A .mat in SBD's layout: a struct GTcls with Boundaries, Segmentation and CategoriesPresent."""
    scipy_io = pytest.importorskip("scipy.io")
    file = io.BytesIO()
    fields = {"Boundaries": np.zeros((20, 1), object), "Segmentation": mask_HW, "CategoriesPresent": [[1], [15]]}
    scipy_io.savemat(file, {"GTcls": fields}, do_compression=True)
    return file.getvalue()


def test_an_8_bit_png_is_not_touched():
    for image in (Image.fromarray(MASK_HW), Image.fromarray(MASK_HW).convert("P")):
        data = encoded(image)
        assert index_png(data, "a.png") == data


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_vocs_colours_become_indices(mode):
    assert (indices(encoded(Image.fromarray(COLOURS[MASK_HW]).convert(mode))) == MASK_HW).all()


def test_16_bits_become_8():
    assert (indices(encoded(Image.fromarray(MASK_HW.astype(np.uint16)))) == MASK_HW).all()


def test_a_mat_of_sbd():
    assert (indices(sbd(MASK_HW)) == MASK_HW).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: encoded(Image.new("RGB", (2, 2), (1, 2, 3))), r"a.png: colour \(1, 2, 3\) is not in PASCAL VOC's palette"),
        (lambda: encoded(Image.new("RGB", (2, 2), (255, 255, 255))), r"a.png: colour \(255, 255, 255\) is not in"),
        (lambda: encoded(Image.new("RGBA", (2, 2), (128, 0, 0, 7))), "a.png: a mask with transparent pixels"),
        (lambda: encoded(Image.fromarray(np.full((2, 2), 256, np.uint16))), "a.png: a 16-bit mask that holds 256"),
        (lambda: encoded(Image.new("1", (2, 2))), "a.png: a mask of mode 1; save class indices"),
        (lambda: encoded(Image.new("L", (2, 2)), "JPEG"), "a.png: not a PNG of class indices"),
        (lambda: encoded(Image.new("RGB", (2, 2)))[:45], "a.png: not a PNG of class indices"),
        (lambda: b"", "a.png: not a PNG of class indices"),
        (lambda: sbd(MASK_HW)[:200], "a.png: not a .mat of SBD"),
        (lambda: sbd(MASK_HW.astype(np.int32)), "a.png: not a .mat of SBD .*int32"),
    ],
)
def test_other_masks_are_refused(make, message):
    with pytest.raises(ShardError, match=message):
        index_png(make(), "a.png")


def test_without_scipy_a_mat_names_the_way_to_install_it(monkeypatch):
    data = sbd(MASK_HW)
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    with pytest.raises(ShardError, match=r"needs scipy; run: pip install 'weakclip\[sbd\]'"):
        index_png(data, "a.mat")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.binary(min_size=1, max_size=4), st.sampled_from(["colours", "mat"]))
def test_damage_never_escapes(at, damage, kind):
    data = encoded(Image.fromarray(COLOURS[MASK_HW])) if kind == "colours" else sbd(MASK_HW)
    data = data[: at % len(data)] + damage + data[at % len(data) + len(damage) :]
    try:
        index_png(data, "a.png")
    except ShardError as error:
        assert str(error).startswith("a.png: ")
