"""Data sets in their own layouts: COCO, PASCAL VOC, a folder with a CSV; and mapping to another class list."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from weakclip.data.index import ShardError
from weakclip.data.sample import Sample
from weakclip.datasets import coco
from weakclip.datasets.folder import folder_items
from weakclip.datasets.items import Item, labelled, with_cams
from weakclip.datasets.loading import load_item
from weakclip.datasets.voc import voc_items
from weakclip.labels import COCO, COCO_ID_TO_CLASS, VOC, class_map

H, W = 40, 60
MAP = np.linspace(0, 1, H * W, dtype=np.float32).reshape(H, W)


def loaded(item: Item, target: Sequence[str] = COCO, names: Sequence[str] = COCO) -> Sample:
    return load_item(item, class_map(names, target))


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def save_image(file: Path, array: np.ndarray | None = None) -> Path:
    """An RGB image of H x W, or `array` as a mask; parent folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    (Image.new("RGB", (W, H)) if array is None else Image.fromarray(array)).save(file)
    return file


def mask_with(*values: int) -> np.ndarray:
    """H x W whose first pixels have these values, the rest 0."""
    mask_HW = np.zeros((H, W), np.uint8)
    mask_HW.flat[: len(values)] = values
    return mask_HW


# --------------------------------------------------------------------------------------------------------------- COCO


def square(left: float, top: float, side: float) -> list[list[float]]:
    return [[left, top, left + side, top, left + side, top + side, left, top + side]]


def annotation(image_id: int, category_id: int, segmentation, iscrowd: int = 0) -> dict:
    return {"image_id": image_id, "category_id": category_id, "segmentation": segmentation, "iscrowd": iscrowd}


CATEGORIES = [{"id": number, "name": COCO[index]} for number, index in COCO_ID_TO_CLASS.items()]


def coco_items(images, annotations, with_masks=False) -> list:
    return coco.coco_items(images, annotations, COCO, with_masks).items


@pytest.fixture
def split(tmp_path):
    """A small COCO split; returns a function that writes it with these annotations and gives coco_items' arguments."""

    def write(annotations: list[dict], files=("b.jpg", "a.jpg", "c.jpg"), **changes) -> dict:
        (tmp_path / "images").mkdir()
        for name in files:
            Image.new("RGB", (W, H)).save(tmp_path / "images" / name)
        listed = ((9, "b.jpg"), (4, "a.jpg"), (5, "c.jpg"))
        images = [{"id": number, "file_name": name, "height": H, "width": W} for number, name in listed]
        found = {"images": images, "annotations": annotations, "categories": CATEGORIES, **changes}
        (tmp_path / "instances.json").write_text(json.dumps(found))
        return {"images": tmp_path / "images", "annotations": tmp_path / "instances.json"}

    return write


def test_images_are_ordered_by_id_and_labelled_by_their_annotations(split):
    crowd = annotation(9, 13, {"counts": [H * W], "size": [H, W]}, iscrowd=1)
    items = coco_items(**split([annotation(9, 90, []), annotation(4, 1, []), annotation(9, 90, []), crowd]))
    assert [(item.key, item.classes) for item in items] == [("a", (1,)), ("c", ()), ("b", (12, 80))]
    sample = loaded(items[2])
    assert (sample.height, sample.width, sample.image_ext, sample.source) == (H, W, "jpg", "images/b.jpg")
    assert (sample.cam, sample.seed, sample.mask) == (None, None, None)
    assert sample.image == items[2].image.read_bytes()


def test_a_png_is_known_by_its_bytes(split):
    arguments = split([])
    Image.new("RGB", (W, H)).save(arguments["images"] / "a.jpg", "PNG")
    assert loaded(coco_items(**arguments)[0]).image_ext == "png"


def test_masks_show_the_smaller_instance_on_top(split):
    hole = square(10, 10, 5)[0]
    crowd = {"counts": [0, 3, H * W - 3], "size": [H, W]}
    found = [
        annotation(4, 2, square(4, 4, 8)),
        annotation(4, 1, square(0, 0, 30)),
        annotation(4, 3, [hole, [40.4, 0.4, 44.6, 0.4, 44.6, 3.6, 40.4, 3.6]]),
        annotation(4, 4, crowd, iscrowd=1),
        annotation(4, 5, square(W - 3, H - 3, 90)),
    ]
    mask = pixels(loaded(coco_items(**split(found), with_masks=True)[0]).mask)
    want = np.zeros((H, W), np.uint8)
    want[:30, :30] = 1
    want[4:12, 4:12] = 2
    want[10:15, 10:15] = want[0:4, 40:45] = 3  # a pixel counts when its centre is inside
    want[0:3, 0] = 4
    want[H - 3 :, W - 3 :] = 5
    np.testing.assert_array_equal(mask, want)


@pytest.mark.parametrize("segmentation", [{"counts": "P", "size": [H, W]}, {"counts": [0, 5]}, [[1, 2, 3]], 7, {}])
def test_segmentations_that_cannot_be_drawn_are_named(split, segmentation):
    items = coco_items(**split([annotation(4, 1, segmentation)]), with_masks=True)
    with pytest.raises(ShardError, match="^a: a segmentation is neither polygons nor RLE of this image"):
        loaded(items[0])


def test_files_and_annotations_must_agree(split):
    with pytest.raises(ShardError, match="c.jpg: no such JPEG, PNG or WebP image, but .*instances.json lists it"):
        coco_items(**split([], files=("a.jpg", "b.jpg")))


def test_an_image_that_is_not_listed_is_named(split):
    with pytest.raises(ShardError, match=r"d.jpg: .*instances.json does not list this image \(and 1 more\)"):
        coco_items(**split([], files=("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.png")))


@pytest.mark.parametrize(
    "annotations, changes, message",
    [
        ([annotation(4, 12, [])], {}, "category_id 12 is not listed under 'categories'"),
        ([annotation(77, 1, [])], {}, "annotations of image 77, which is not listed"),
        ([{"image_id": 4}], {}, "not a COCO instances file .*category_id"),
        ([], {"images": [{"id": 4}]}, "not a COCO instances file .*file_name"),
        ([], {"images": [{"id": 4, "file_name": "a.jpg", "height": H, "width": W}] * 2}, "two images have the same id"),
        (None, {}, "not a COCO instances file"),
    ],
)
def test_bad_annotations_are_named(split, annotations, changes, message):
    with pytest.raises(ShardError, match=f"instances.json: {message}"):
        coco_items(**split(annotations, **changes))


def test_a_file_that_is_not_json_is_named(split):
    arguments = split([])
    arguments["annotations"].write_text("{")
    with pytest.raises(ShardError, match="instances.json: not a COCO instances file"):
        coco_items(**arguments)


# ------------------------------------------------------------------------------------------------------ real COCO files


@pytest.mark.parametrize("part", ["train2014", "val2014"])
def test_labels_of_real_coco(coco_mini, part):
    items = coco_items(coco_mini / part, coco_mini / f"annotations/instances_{part}.json")
    lines = (coco_mini / f"labels/{part}/image_labels.csv").read_text().splitlines()[1:]
    want = {int(image): ids.split() for image, _, ids in (line.partition(",") for line in lines)}
    assert len(items) == 70
    assert {int(i.key[-12:]): i.classes for i in items} == {
        image: tuple(sorted(COCO_ID_TO_CLASS[int(raw)] for raw in ids)) for image, ids in want.items()
    }


@pytest.mark.parametrize("part", ["train2014", "val2014"])
def test_masks_of_real_coco_have_every_pixel(coco_mini, part):
    """Instances do not overlap in these files, so each class covers exactly the sum of its annotations' areas."""
    file = coco_mini / f"annotations/instances_{part}.json"
    areas: dict[int, np.ndarray] = {}
    for one in json.loads(file.read_text())["annotations"]:
        counts = areas.setdefault(one["image_id"], np.zeros(len(COCO), int))
        counts[COCO_ID_TO_CLASS[one["category_id"]]] += one["area"]
    items = [item for item in coco_items(coco_mini / part, file, with_masks=True) if item.classes]
    for item in items[::3]:
        counts = np.bincount(pixels(loaded(item).mask).ravel(), minlength=len(COCO))
        np.testing.assert_array_equal(counts[1:], areas[int(item.key[-12:])][1:], item.key)


# ---------------------------------------------------------------------------------------------------------------- VOC

OBJECT = "<object><name>{}</name><difficult>{}</difficult><part><name>head</name></part></object>"


def xml(*names: str, difficult: int = 0) -> str:
    objects = "".join(OBJECT.format(name, difficult) for name in names)
    return f"<annotation><folder>VOC2012</folder><owner><name>someone</name></owner>{objects}</annotation>"


@pytest.fixture
def devkit(tmp_path) -> Path:
    """VOC2012 with four images: a dog and a person, a chair (difficult), nothing, and one of the test split."""
    root = tmp_path / "VOCdevkit/VOC2012"
    labels = {"2007_000032": xml("person", "dog", "dog"), "2008_000008": xml("chair", difficult=1), "2009_000001": xml()}
    (root / "Annotations").mkdir(parents=True)
    for key, text in labels.items():
        (root / f"Annotations/{key}.xml").write_text(text)
    for key in (*labels, "2008_000006"):
        save_image(root / f"JPEGImages/{key}.jpg")
    save_image(root / "SegmentationClass/2007_000032.png", mask_with(12, 15, 255))
    save_image(root / "SegmentationClassAug/2007_000032.png", mask_with(1))
    save_image(root / "SegmentationClassAug/2008_000008.png", mask_with(9))
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2008_000008\n2007_000032\n2009_000001\n")
    (lists / "test.txt").write_text("2008_000006\n")
    return root


def test_voc_labels_are_all_objects_of_the_xml_difficult_ones_too(devkit):
    items = voc_items(devkit, "train")
    assert [(item.key, item.classes) for item in items] == [("2008_000008", (9,)), ("2007_000032", (12, 15)), ("2009_000001", ())]
    sample = loaded(items[1], VOC, VOC)
    assert (sample.height, sample.width, sample.image_ext, sample.source) == (H, W, "jpg", "JPEGImages/2007_000032.jpg")
    assert sample.image == (devkit / "JPEGImages/2007_000032.jpg").read_bytes()


def test_a_voc_split_may_be_a_list_of_image_and_mask_paths(devkit, tmp_path):
    """As SEAM, PSA and DeepLab have their trainaug lists."""
    file = tmp_path / "train_aug.txt"
    file.write_text("/JPEGImages/2008_000008.jpg /SegmentationClassAug/2008_000008.png\n\n")
    assert [item.key for item in voc_items(devkit, str(file))] == ["2008_000008"]


def test_vocs_own_masks_come_before_those_of_sbd_and_keep_their_bytes(devkit, tmp_path):
    (tmp_path / "two.txt").write_text("2007_000032\n2008_000008\n")
    own, sbd = (loaded(item, VOC, VOC) for item in voc_items(devkit, str(tmp_path / "two.txt"), with_masks=True))
    assert own.mask == (devkit / "SegmentationClass/2007_000032.png").read_bytes()
    assert sbd.mask == (devkit / "SegmentationClassAug/2008_000008.png").read_bytes()
    with pytest.raises(ShardError, match="SegmentationClass/2009_000001.png: no such mask, nor SegmentationClassAug/"):
        voc_items(devkit, "train", with_masks=True)


def test_test_images_of_voc_have_no_labels_whatever_xml_there_is(devkit):
    """The test devkit has XML with the boxes of other tasks for some of them."""
    (devkit / "Annotations/2008_000006.xml").write_text(xml("person"))
    (item,) = voc_items(devkit, "test")
    sample = loaded(item, VOC, VOC)
    assert item.classes is None and labelled([item], range(21)) == [item]
    assert (sample.classes, sample.cam, sample.seed, sample.mask) == ((), None, None, None)


@pytest.mark.parametrize("key", ["2009_000001", 2009000001, np.int32(2009000001), np.str_("2009_000001")])
def test_voc_labels_without_xml_come_from_cls_labels(devkit, tmp_path, key):
    (devkit / "Annotations/2009_000001.xml").unlink()
    with pytest.raises(ShardError, match="2009_000001.xml: no such file; pass the labels .* with --labels"):
        voc_items(devkit, "train")
    hot_n = np.zeros(20, np.float32)
    hot_n[[0, 19]] = 1
    np.save(tmp_path / "cls_labels.npy", {key: hot_n, "2007_000032": 1 - hot_n}, allow_pickle=True)
    classes = {item.key: item.classes for item in voc_items(devkit, "train", tmp_path / "cls_labels.npy")}
    assert classes == {"2009_000001": (1, 20), "2007_000032": (12, 15), "2008_000008": (9,)}


@pytest.mark.parametrize(
    "labels, message",
    [
        ({"2009_000001": np.ones(21)}, "--labels: '2009_000001' must have 20 zeros and ones"),
        ({"2009_000001": np.full(20, np.nan)}, "must have 20 zeros and ones"),
        ({"2009_000001": np.full(20, 0.5)}, "must have 20 zeros and ones"),
        ({"2009_000001": [1, [2]]}, "must have 20 zeros and ones"),
        ({"2009_000001": np.full(20, None)}, "must have 20 zeros and ones"),
        ({"2009_000002": np.ones(20)}, "2009_000001.xml: no such file; pass the labels"),
        (np.ones((3, 20)), "cls_labels.npy: holds no dict"),
        ({"2009_000001": Path("x")}, "cls_labels.npy: refused to load"),
    ],
)
def test_bad_cls_labels_are_named(devkit, tmp_path, labels, message):
    (devkit / "Annotations/2009_000001.xml").unlink()
    np.save(tmp_path / "cls_labels.npy", labels, allow_pickle=True)
    with pytest.raises(ShardError, match=message):
        voc_items(devkit, "train", tmp_path / "cls_labels.npy")


LAUGHS = '<!DOCTYPE a [<!ENTITY a "ha">' + "".join(
    f'<!ENTITY {b} "{f"&{a};" * 30}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not XML"),
        ("<annotation><object>", "not XML"),
        ("<html/>", "not a VOC annotation: its root is <html>"),
        (xml("zebra"), "object 'zebra' is not one of VOC's 20 classes"),
        (xml("background"), "object 'background' is not one"),
        (xml(""), "object '' is not one"),
        ("<annotation><object/></annotation>", "object '' is not one"),
        ('<?xml version="1.0" encoding="klingon"?><annotation/>', "not XML"),
        (LAUGHS + "]><annotation><object><name>&i;</name></object></annotation>", "not XML"),
    ],
)
def test_bad_xml_is_named(devkit, text, message):
    (devkit / "Annotations/2008_000008.xml").write_text(text)
    with pytest.raises(ShardError, match=f"2008_000008.xml: {message}"):
        voc_items(devkit, "train")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("trainaug",), "Segmentation/trainaug.txt: no such split, and 'trainaug' is not a file"),
        (("test", Path("cls_labels.npy")), "cls_labels.npy: VOC's test images have no labels"),
        (("train", Path("labels.txt")), "labels.txt: --labels must be a .npy or .npz"),
    ],
)
def test_mistakes_with_a_devkit_are_named(devkit, arguments, message):
    with pytest.raises(ShardError, match=message):
        voc_items(devkit, *arguments)


def test_missing_parts_of_a_devkit_are_named(devkit):
    with pytest.raises(ShardError, match="VOCdevkit: has no JPEGImages; --devkit must be the directory VOCdevkit/VOC2012"):
        voc_items(devkit.parent, "train")
    (devkit / "ImageSets/Segmentation/val.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ShardError, match="val.txt: byte 0xFF in line 1 is not UTF-8"):
        voc_items(devkit, "val")
    (devkit / "JPEGImages/2008_000008.jpg").unlink()
    with pytest.raises(ShardError, match="2008_000008.jpg: no such image, but train lists it"):
        voc_items(devkit, "train")


# ------------------------------------------------------------------------------------------------------------- folder

PETS = ("background", "cat", "dog", "dining table")


@pytest.fixture
def pets(tmp_path):
    """Three images; returns a function that writes labels.csv and lists the folder with it."""
    for name in ("b.png", "a.jpg", "c.JPEG"):
        save_image(tmp_path / "pets" / name)
    (tmp_path / "pets/Thumbs.db").touch()

    def write(text: str | bytes, **more: Path) -> list[Item]:
        (tmp_path / "labels.csv").write_bytes(text.encode() if isinstance(text, str) else text)
        return folder_items(tmp_path / "pets", PETS, tmp_path / "labels.csv", **more)

    return write


@pytest.mark.parametrize(
    "text",
    [
        "file,labels\na.jpg,dog;cat\nb.png,\nc.JPEG,diningtable\n",
        "file,labels\r\nb.png,\r\na.jpg,dog\r\nc.JPEG,dining table\r\na.jpg,cat\r\n",
        '\ufefflabels,taken by,file\n"dog; cat;","me, myself",a.jpg\n\n,me,b.png\n dining table ,me, c.JPEG ',
    ],
    ids=["one row an image", "one row a label", "more columns, quotes, spaces"],
)
def test_a_folder_with_a_csv(pets, text):
    assert [(item.key, item.classes) for item in pets(text)] == [("a", (1, 2)), ("b", ()), ("c", (3,))]


def test_a_folder_without_labels_has_all_its_images(tmp_path, pets):
    items = folder_items(tmp_path / "pets", PETS)
    assert [(item.key, item.classes) for item in items] == [("a", None), ("b", None), ("c", None)]
    assert labelled(items, range(4)) == items
    assert [loaded(item, PETS, PETS).image_ext for item in items] == ["jpg", "png", "jpg"]


def test_masks_of_a_folder_are_found_by_key(tmp_path, pets):
    for key in "ab":
        save_image(tmp_path / f"masks/{key}.png", mask_with(3))
    with pytest.raises(ShardError, match="masks/c.png: no such mask; draw it, or leave --masks out"):
        folder_items(tmp_path / "pets", PETS, masks=tmp_path / "masks")
    (tmp_path / "pets/c.JPEG").unlink()
    items = folder_items(tmp_path / "pets", PETS, masks=tmp_path / "masks")
    assert loaded(items[0], PETS, PETS).mask == (tmp_path / "masks/a.png").read_bytes()


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "labels.csv: line 1 must be the header file,labels or have a column for each class, is ''"),
        ("a.jpg,dog\n", "line 1 must be the header file,labels or .*, is 'a.jpg,dog'"),
        ("file|labels\na.jpg|dog\n", "line 1 must be the header file,labels or .*, is 'file.labels'"),
        ("file,labels,labels\n", "line 1 must be the header"),
        ("file,labels\na.jpg,dog,cat\n", "line 2: must have one field per column; separate labels by ';'"),
        ("file,labels\na.jpg,dog\nb.png\n", "line 3: must have one field per column"),
        ("file,labels\na.jpg,dgo\n", "line 2: 'dgo' is not one of the 3 classes; the closest is 'dog'"),
        ("file,labels\na.jpg,background\n", "line 2: 'background' is not one of the 3 classes"),
        ("file,labels\na.jpg,\nb.png,\n", "pets/c.JPEG: .*labels.csv does not list this image"),
        (
            "file,labels\na.jpg,\nb.png,\nc.JPEG,\nd.webp,\n",
            "pets/d.webp: no such JPEG, PNG or WebP image, but .*csv lists it",
        ),
        ('file,labels\n"a.jpg,\n', "labels.csv: not a CSV"),
        (b"file,labels\na.jpg,\xff\n", "labels.csv: byte 0xFF in line 2 is not UTF-8"),
    ],
)
def test_a_bad_csv_is_named_with_its_line(pets, text, message):
    with pytest.raises(ShardError, match=message):
        pets(text)


def test_two_images_of_one_key_are_named(tmp_path, pets):
    save_image(tmp_path / "pets/a.png")
    with pytest.raises(ShardError, match="pets/a.png: has the same name without its suffix as .*pets/a.jpg; rename"):
        labelled(folder_items(tmp_path / "pets", PETS), range(4))


# --------------------------------------------------------------------------------------------- what all sources share


def test_an_image_that_is_none_is_named(tmp_path):
    (tmp_path / "a.jpg").write_text("GIF89a")
    with pytest.raises(ShardError, match="a.jpg: not a JPEG, PNG or WebP image"):
        loaded(Item("a", tmp_path / "a.jpg", (1,)))


def test_an_image_of_another_size_than_its_annotations_is_named(tmp_path):
    item = Item("a", save_image(tmp_path / "a.jpg"), (1,), size_HW=(W, H))
    with pytest.raises(ShardError, match=r"a.jpg: its annotations are for an image of \(H, W\) \(60, 40\), but it is \(40, 60\)"):
        loaded(item)


def test_cams_and_seeds_are_found_by_key(tmp_path):
    a, b = items = [Item(key, save_image(tmp_path / f"{key}.jpg"), (1,)) for key in "ab"]
    cams = tmp_path / "cams"
    cams.mkdir()
    np.save(cams / "a.npy", {0: MAP}, allow_pickle=True)
    with pytest.raises(ShardError, match="cams/b.npy: no such file, nor .npz or .png"):
        with_cams(items, cams)
    save_image(cams / "b.png", mask_with(1))
    a, b = map(loaded, with_cams(items, cams))
    assert a.cam.classes == (1,) and a.seed is None
    assert b.cam is None and b.seed == (cams / "b.png").read_bytes()
    np.savez(cams / "a.npz", **{"0": MAP})
    with pytest.raises(ShardError, match="a.npy: a.npz exists too"):
        with_cams(items, cams)
    with pytest.raises(ShardError, match="a.jpg: has no labels, but a CAM needs them; leave --cams out"):
        with_cams([replace(items[0], classes=None)], cams)


@pytest.fixture
def street(tmp_path) -> Item:
    """A COCO image of an airplane (5), a truck (8) and a couch (58): COCO's indices; VOC has no truck."""
    np.save(tmp_path / "street.npy", {57: MAP / 2, 7: MAP / 4, 4: MAP}, allow_pickle=True)
    seed, mask = (save_image(tmp_path / name, mask_with(8, 5, 58, 255, 0)) for name in ("street.png", "mask.png"))
    return Item("street", save_image(tmp_path / "street.jpg"), (5, 8, 58), tmp_path / "street.npy", seed, mask)


def test_classes_become_those_of_another_list(street):
    aeroplane, sofa = VOC.index("aeroplane"), VOC.index("sofa")
    sample = loaded(street, VOC)
    assert sample.classes == sample.cam.classes == (aeroplane, sofa)
    np.testing.assert_allclose(sample.cam.maps_nhw / 255, [MAP, MAP / 2], atol=0.002)
    for part in (sample.seed, sample.mask):
        np.testing.assert_array_equal(pixels(part), mask_with(0, aeroplane, sofa, 255, 0))
    assert sample.image == loaded(street).image


def test_maps_are_ordered_by_the_new_classes(street):
    sample = loaded(street, ("background", "couch", "truck", "airplane"))
    assert sample.classes == sample.cam.classes == (1, 2, 3)
    np.testing.assert_allclose(sample.cam.maps_nhw / 255, [MAP / 2, MAP / 4, MAP], atol=0.002)


def test_within_one_class_list_no_byte_changes(street):
    sample = loaded(street)
    assert (sample.seed, sample.mask) == (street.seed.read_bytes(), street.mask.read_bytes())


def test_a_class_outside_the_own_list_is_not_taken_for_ignored(street):
    save_image(street.mask, mask_with(81))
    with pytest.raises(ShardError, match="street.jpg: mask.png holds 81, which is neither 0..80 nor 255"):
        loaded(street, VOC)


def test_a_cam_left_without_maps_is_an_empty_one(street):
    np.save(street.cam, {7: MAP}, allow_pickle=True)
    sample = loaded(street, VOC)
    assert sample.cam.classes == () and sample.cam.maps_nhw.shape == (0, H, W) and sample.cam.fits(H, W)


def test_images_without_a_label_in_the_new_list_are_left_out(street):
    truck, mixed, unknown = (replace(street, name=key, classes=of) for key, of in (("a", (8,)), ("b", (5, 8)), ("c", None)))
    assert labelled([truck, mixed, unknown], class_map(COCO, VOC)) == [mixed, unknown]
    assert labelled([truck, mixed, unknown], class_map(COCO, COCO)) == [truck, mixed, unknown]


# ------------------------------------------------------------------------------------------------------------- damage

VALUES = st.recursive(
    st.none() | st.integers() | st.floats() | st.sampled_from([4, "a.jpg", "b.jpg", "c.jpg", H, W, {"counts": [H * W]}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["counts", "id", "image_id"]), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_value_in_coco_annotations_is_an_error_or_still_a_sample(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "any_coco"
    for name in ("a.jpg", "b.jpg"):
        if not (folder / name).exists():
            save_image(folder / name)
    images = [{"id": number, "file_name": name, "height": H, "width": W} for number, name in ((1, "a.jpg"), (2, "b.jpg"))]
    drawn = [annotation(1, 1, square(0, 0, 9)), annotation(1, 2, {"counts": [9, H * W - 9]})]
    raw = {"images": images, "annotations": drawn, "categories": [dict(category) for category in CATEGORIES[:3]]}
    place = data.draw(st.sampled_from([raw, *raw["images"], *raw["annotations"], *raw["categories"]]))
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(VALUES)
    (folder / "instances.json").write_text(json.dumps(raw))
    with suppress(ShardError):
        for item in coco_items(folder, folder / "instances.json", with_masks=True):
            assert pixels(loaded(item).mask).shape == (H, W)


PIECES = st.binary(max_size=3) | st.sampled_from([b"", b"\0", b"\xff", b'"', b",", b"&", b"<!--", b"\n", b"\r", b";"])


@st.composite
def damaged(draw, good: bytes) -> bytes:
    """`good` with pieces replaced, repeated or cut off."""
    data = good
    for _ in range(draw(st.integers(1, 3))):
        first, second = sorted(draw(st.tuples(st.integers(0, len(data)), st.integers(0, len(data)))))
        ends = st.sampled_from([data[second:], data[first:], b""])
        data = data[:first] + draw(PIECES) + draw(ends)
    return data


@settings(max_examples=100, deadline=None)
@given(text=damaged(xml("person", "dog").encode()))
def test_damaged_xml_is_an_error_or_still_labels(tmp_path_factory, text):
    root = tmp_path_factory.getbasetemp() / "damaged_voc"
    if not root.exists():
        save_image(root / "JPEGImages/a.jpg")
        (root / "Annotations").mkdir()
        (root / "split.txt").write_text("a\n")
    (root / "Annotations/a.xml").write_bytes(text)
    with suppress(ShardError):
        (item,) = voc_items(root, str(root / "split.txt"))
        assert set(item.classes) <= {12, 15}


@settings(max_examples=100, deadline=None)
@given(text=damaged(b"file,labels\na.jpg,dog;cat\nb.png,cat\n"))
def test_a_damaged_csv_is_an_error_or_still_labels(tmp_path_factory, text):
    root = tmp_path_factory.getbasetemp() / "damaged_csv"
    for name in ("a.jpg", "b.png"):
        if not (root / name).exists():
            save_image(root / name)
    (root / "labels.csv").write_bytes(text)
    with suppress(ShardError):
        for item in folder_items(root, PETS, root / "labels.csv"):
            assert set(item.classes) <= {1, 2}


@settings(max_examples=100, deadline=None)
@given(text=st.binary(max_size=40) | damaged(b"/JPEGImages/a.jpg /Seg/a.png\n"))
def test_a_damaged_split_is_an_error_or_still_names(tmp_path_factory, text):
    root = tmp_path_factory.getbasetemp() / "damaged_split"
    if not root.exists():
        save_image(root / "JPEGImages/a.jpg")
        (root / "Annotations").mkdir()
        (root / "Annotations/a.xml").write_text(xml("dog"))
    (root / "split.txt").write_bytes(text)
    with suppress(ShardError):
        assert {item.key for item in voc_items(root, str(root / "split.txt"))} <= {"a"}
