"""COCO's format with anyone's categories, and segmentations as pycocotools draws them."""

from __future__ import annotations

import json
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle

from weakclip.data.index import Index, ShardError
from weakclip.datasets import build
from weakclip.datasets.coco import coco_items, segment_mask
from weakclip.labels import COCO, VOC

H, W = 60, 100
LARGE = rle.encode(np.ones((200, 200), np.uint8, order="F"))["counts"].decode()
SQUARE = [[0, 0, 50, 0, 50, 50, 0, 50]]


@pytest.fixture
def instances(tmp_path):
    """`instances((category id, ...), {id: name})`: a file with one image, annotated with these categories, and its folder."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (W, H)).save(tmp_path / "images" / "a.jpg")

    def write(annotated, categories, segmentation=SQUARE):
        listed = [{"id": number, "name": name} for number, name in categories.items()]
        found = [{"image_id": 1, "category_id": number, "segmentation": segmentation} for number in annotated]
        images = [{"id": 1, "file_name": "a.jpg", "height": H, "width": W}]
        path = tmp_path / "instances.json"
        path.write_text(json.dumps({"images": images, "annotations": found, "categories": listed}))
        return tmp_path / "images", path

    return write


@pytest.mark.parametrize(
    ("categories", "target", "own", "index"),
    [
        ({17: "bird", 16: "cat"}, COCO, COCO, 16),  # COCO's cat is 17, and the 16th of its classes
        ({0: "animals", 16: "cat"}, COCO, COCO, 16),  # without annotations a category does not matter
        ({16: " cat "}, VOC, COCO, 16),
        ({16: "aeroplane"}, VOC, COCO, 5),  # VOC's name of an airplane
        ({16: "kitten", 17: "cat"}, ("background", "dog", "kitten"), ("background", "dog", "kitten"), 2),
    ],
)
def test_names_decide_and_ids_are_free(instances, categories, target, own, index):
    found = coco_items(*instances([16], categories), target)
    assert (found.classes, found.items[0].classes) == (own, (index,))


def test_a_name_outside_the_class_list_is_refused_with_the_nearest(instances):
    message = r"instances.json: category 'kat' is not in the class list \(nearest: 'cat'\); .* --classes from-annotations"
    with pytest.raises(ShardError, match=message):
        coco_items(*instances([7], {7: "kat"}), ("background", "dog", "cat"))


@pytest.mark.parametrize("wrong", ["7", True, 7.0, None])
def test_ids_are_whole_numbers(instances, wrong):
    with pytest.raises(ShardError, match="not a COCO instances file .*expected: image_id int, category_id int"):
        coco_items(*instances([wrong], {7: "cat"}), COCO)


def test_a_files_own_categories_become_the_class_list(instances, tmp_path, capsys):
    images, annotations = instances([9, 4], {9: "kitten", 2: "unused", 4: "cow shed"})
    arguments = ["coco", "--images", images, "--annotations", annotations, "--masks", "--classes", "from-annotations"]
    build.main([*map(str, arguments), "--out", str(tmp_path / "set"), "--processes", "1"])
    assert (tmp_path / "set.names.txt").read_text() == "background\ncow shed\nkitten\n"
    assert Index.load(tmp_path / "set").classes == ("background", "cow shed", "kitten")
    assert f"{tmp_path}/set.names.txt: the classes of" in capsys.readouterr().out
    (tmp_path / "other.names.txt").write_text("background\ndog\n")
    with pytest.raises(ShardError, match="other.names.txt: lists other classes than .*instances.json"):
        build.main([*map(str, arguments), "--out", str(tmp_path / "other")])


def test_cams_with_cocos_ids_need_cocos_categories(instances, tmp_path):
    images, annotations = instances([9], {9: "kitten"})
    arguments = ["coco", "--images", images, "--annotations", annotations, "--classes", "from-annotations"]
    with pytest.raises(ValueError, match="cam_keys=coco: the annotations' categories are not COCO's"):
        build.main([*map(str, arguments), "--cam-keys", "coco", "--cams", str(images), "--out", str(tmp_path / "set")])


# ------------------------------------------------------------------------------------------------------- segmentations


def compressed(inside_HW) -> dict:
    found = rle.encode(np.asfortranarray(inside_HW.astype(np.uint8)))
    return {"size": found["size"], "counts": found["counts"].decode()}


def uncompressed(inside_HW) -> dict:
    pixels = inside_HW.T.ravel()
    ends = np.flatnonzero(np.diff(pixels, append=2)) + 1
    counts = np.diff(ends, prepend=0).tolist()
    return {"size": list(inside_HW.shape), "counts": [0, *counts] if pixels[0] else counts}


def test_two_thousand_segmentations_are_drawn_as_pycocotools_draws_them():
    generator = np.random.default_rng(0)
    for number in range(2000):
        height, width = (int(side) for side in generator.integers(1, 90, 2))
        inside_HW = (generator.random((height, width)) < generator.random()).astype(np.uint8)
        polygons = [((generator.random((int(count), 2)) * 1.4 - 0.2) * (width, height)).ravel() for count in (3, 8)]
        drawn = (compressed(inside_HW), uncompressed(inside_HW), [corners.tolist() for corners in polygons])[number % 3]
        if isinstance(drawn, list):
            inside_HW = rle.decode(rle.merge(rle.frPyObjects(drawn, height, width)))
        np.testing.assert_array_equal(segment_mask(drawn, height, width), inside_HW.astype(bool))


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [W, H], "counts": [0, 30, 5970]}, r"size is \[100, 60\], but the image's \[height, width\] is \[60, 100\]"),
        ({"size": [H, W], "counts": [0, 30]}, "its runs cover 30 pixels of 6000"),
        ({"size": [H, W], "counts": [-30, 6030]}, "its runs cover 6000 pixels"),
        ({"size": [H, W], "counts": LARGE}, "its runs cover 40000 pixels"),
        ({"size": [H, W], "counts": "0`"}, "its counts are cut off"),
        ({"size": [H, W], "counts": "0 4"}, "' ' is no part of a compressed RLE"),
        ([[0, 0, 5, 5]], "a polygon has 4 coordinates"),
        ([[0, 0, 5, 5, 1e12, 3]], "far outside the image"),
        ([[0, 0, 5, 5, float("nan"), 3]], "far outside the image"),
    ],
)
def test_segmentations_that_cannot_be_meant_are_refused_with_the_image(instances, segmentation, message):
    (item,) = coco_items(*instances([7], {7: "cat"}, segmentation), COCO, with_masks=True).items
    with pytest.raises(ShardError, match=f"^a: a segmentation is neither polygons nor RLE of this image .*{message}"):
        item.mask.read_bytes()


def test_compressed_runs_may_leave_out_the_background_at_the_end():
    mask_HW = segment_mask({"size": [H, W], "counts": "0`1"}, H, W)  # 48 pixels down the first column
    assert mask_HW.sum() == 48 and mask_HW[:48, 0].all()


@given(st.text(max_size=12), st.integers(1, 9), st.integers(1, 9))
def test_any_string_is_an_error_or_a_mask(counts, height, width):
    with suppress(ValueError):
        assert segment_mask({"size": [height, width], "counts": counts}, height, width).shape == (height, width)
