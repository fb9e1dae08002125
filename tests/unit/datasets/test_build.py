"""What people feed `weakclip build`: names, folders, formats, lists and masks that other tools write."""

from __future__ import annotations

import io
import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from weakclip.config import ConfigError
from weakclip.data.index import Index, ShardError
from weakclip.data.reading import load, read_entry
from weakclip.data.sample import DecodedSample
from weakclip.datasets import build, reshard, show
from weakclip.labels import VOC, palette
from weakclip.masks import mask_folder
from weakclip.runtime.errors import UserError

H, W = 6, 8


@pytest.fixture
def images(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "names.txt").write_text("background\ncat\ndog\n")
    return tmp_path / "images"


def save(path: Path, kind: str | None = None, colour=(9, 8, 7)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (W, H), colour).save(path, kind)
    return path


def folder(images: Path, *options: str) -> Index:
    """The set built of the images, in a process of its own if asked for."""
    names = images.with_name("names.txt")
    out = images.with_name("set")
    build.main(["folder", "--images", str(images), "--classes", str(names), "--out", str(out), "--processes", "1", *options])
    return Index.load(out)


def samples(index: Index) -> dict[str, DecodedSample]:
    return {entry.name: load(index, entry) for entry in index.entries}


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["my.photo.1", "Fähre", "a b", "50%", "a\nb", "a..b", "a" * 235, "ä" * 115])
def test_masks_come_out_under_the_original_name(images, name, tmp_path):
    save(images / f"{name}.jpg")
    index = folder(images)
    (entry,) = index.entries
    about = json.loads(read_entry(index, entry)["json"])
    assert entry.name == about.get("name", entry.key) == name and about["id"] == entry.key
    mask_folder.save(np.ones((H, W), np.uint8), mask_folder.mask_path(tmp_path / "masks", entry.name))
    assert os.listdir(tmp_path / "masks") == [f"{name}.png"]
    assert mask_folder.missing(tmp_path / "masks", index.entries) == []
    reshard.main([str(index.root), "--seeds", str(tmp_path / "masks"), "--out", str(tmp_path / "again")])
    (sample,) = samples(Index.load(tmp_path / "again")).values()
    assert sample.name == name and (sample.seed == 1).all()


def test_subfolders_on_request(images, caplog):
    save(images / "trip/a.jpg")
    save(images / "trip/day 2/a.jpg")
    with pytest.raises(ShardError, match="images: holds no images, but its subfolders do, such as .*; add --recursive"):
        folder(images)
    index = folder(images, "--recursive")
    assert [(entry.key, entry.name) for entry in index.entries] == [
        ("trip%2Fa", "trip/a"),
        ("trip%2Fday 2%2Fa", "trip/day 2/a"),
    ]
    assert not caplog.messages


def test_images_in_subfolders_are_not_left_out_silently(images, caplog):
    save(images / "a.jpg")
    save(images / "more/b.jpg")
    assert len(folder(images).entries) == 1
    assert caplog.messages == [
        f"{images}: images in subfolders, such as {images}/more/b.jpg, are not read; --recursive adds them"
    ]


def test_masks_and_cams_lie_where_the_images_do(images, tmp_path):
    save(images / "trip/a.b.jpg")
    (tmp_path / "labels.csv").write_text("file,labels\ntrip/a.b.jpg,dog\n")
    for place in ("masks", "cams"):
        (tmp_path / place / "trip").mkdir(parents=True)
    Image.fromarray(np.full((H, W), 2, np.uint8)).save(tmp_path / "masks/trip/a.b.png")
    np.save(tmp_path / "cams/trip/a.b.npy", {1: np.ones((H, W), np.float32)}, allow_pickle=True)
    given = {"--labels": "labels.csv", "--masks": "masks", "--cams": "cams"}
    index = folder(images, "--recursive", *(str(part) for option, file in given.items() for part in (option, tmp_path / file)))
    sample = samples(index)["trip/a.b"]
    assert (sample.mask == 2).all() and sample.cam.classes == sample.classes == (2,)


def test_both_normal_forms_are_one_name(images, tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Fähre.jpg") for form in ("NFC", "NFD"))
    save(images / decomposed)
    (tmp_path / "labels.csv").write_text(f"file,labels\n{composed},cat\n")
    (tmp_path / "masks").mkdir()
    Image.new("L", (W, H), 1).save(tmp_path / f"masks/{composed[:-4]}.png")
    index = folder(images, "--labels", str(tmp_path / "labels.csv"), "--masks", str(tmp_path / "masks"))
    assert [entry.name for entry in index.entries] == [decomposed[:-4]]  # as it is on the disk
    save(images / composed)
    with pytest.raises(ShardError, match="is the same name in another Unicode form; rename or drop one"):
        folder(images)


def test_a_folder_called_as_a_mask_is_refused(images):
    save(images / "a.jpg")
    save(images / "a.png/b.jpg")
    with pytest.raises(ShardError, match="a.png/b.jpg: its folder would have the name of another file, a.png; rename the folder"):
        folder(images, "--recursive")


def test_twins_among_masks_are_refused(images, tmp_path):
    save(images / "ä.jpg")
    for form in ("NFC", "NFD"):
        save(tmp_path / "masks" / unicodedata.normalize(form, "ä.png"))
    with pytest.raises(ShardError, match="is the same name in another Unicode form; rename or drop one"):
        folder(images, "--masks", str(tmp_path / "masks"))


def test_links_to_folders_above_are_not_followed(images):
    save(images / "trip/a.jpg")
    (images / "trip/again").symlink_to(images / "trip")
    (images / "other").symlink_to(images / "trip")
    assert [entry.name for entry in folder(images, "--recursive").entries] == ["other/a", "trip/a"]


def test_a_name_with_a_newline_can_be_shown(images, tmp_path):
    save(images / "a\nb.jpg")
    show.main([str(folder(images).root), "--out", str(tmp_path / "sheet.png")])
    assert (tmp_path / "sheet.png").is_file()


PARTS = st.binary(min_size=1, max_size=200).map(os.fsdecode).filter(lambda part: not {"/", "\0"} & {*part} and part.strip("."))
FANCY = st.text(st.sampled_from("aé\u0301e.\n %~\\🐈ß"), min_size=1, max_size=20).filter(lambda part: part.strip("."))
FILES = st.lists(st.tuples(st.sampled_from(["", "sub/", "ü/x y/", "a.png/"]), PARTS | FANCY), min_size=1, max_size=4, unique=True)
JPEG = io.BytesIO()
Image.new("RGB", (W, H)).save(JPEG, "JPEG")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(FILES)
def test_any_name_comes_back_or_is_refused_before_anything_is_written(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("names")
    (root / "names.txt").write_text("background\ncat\n")
    for place, name in files:
        (root / "images" / place).mkdir(parents=True, exist_ok=True)
        (root / "images" / f"{place}{name}.jpg").write_bytes(JPEG.getvalue())
    wanted = {f"{place}{name}" for place, name in files}
    try:
        index = folder(root / "images", "--recursive")
    except UserError as error:
        twins = len({unicodedata.normalize("NFC", name) for name in wanted}) < len(wanted)
        assert ("the same name" in str(error) and twins) or ("name of another file, a.png" in str(error) and "a" in wanted)
        assert sorted(os.listdir(root)) == ["images", "names.txt"]
        return
    for entry in index.entries:
        mask_folder.save(np.zeros((H, W), np.uint8), mask_folder.mask_path(root / "masks", load(index, entry).name))
    assert mask_folder.missing(root / "masks", index.entries) == []
    files = (path.relative_to(root / "masks").as_posix() for path in (root / "masks").rglob("*.png") if path.is_file())
    made = {file.removesuffix(".png") for file in files}
    assert made == {entry.name for entry in index.entries} == wanted


# ------------------------------------------------------------------------------------------------------------- formats


def test_webp_is_read_as_it_is_and_others_are_named(images, caplog):
    data = save(images / "a.webp").read_bytes()
    save(images / "b.jpg")
    for name in ("c.tif", "d.TIFF", "e.bmp", "f.gif", "g.tif"):
        save(images / name)
    index = folder(images)
    assert read_entry(index, index.entries[0])["webp"] == data
    assert [*samples(index)] == ["a", "b"] and samples(index)["a"].image.shape == (H, W, 3)
    (line,) = caplog.messages
    assert line.startswith(f"{images}: 5 images are not read (") and "2 .tif" in line and "1 .bmp" in line
    assert "convert them to PNG or JPEG, such as by: magick mogrify -format png" in line


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "a.jpg: is empty; copy it again"),
        (b"hello", "a.jpg: not a JPEG, PNG or WebP image, or damaged; copy or convert it again"),
        ("GIF", "a.jpg: is a GIF; convert it to PNG or JPEG, such as by: magick a.jpg a.png"),
        ("TIFF", "a.jpg: is a TIFF; convert it to PNG"),
        ("BMP", "a.jpg: is a BMP; convert it"),
    ],
)
def test_what_only_looks_like_an_image_is_named(images, data, message):
    if isinstance(data, str):
        save(images / "a.jpg", data)
    else:
        (images / "a.jpg").write_bytes(data)
    with pytest.raises(ShardError, match=message):
        folder(images)


def test_a_phones_photo_of_several_images_is_its_first(images):
    """An MPO: a JPEG with another behind it."""
    first, second = (Image.new("RGB", (W, H), colour) for colour in ("red", "blue"))
    first.save(images / "a.jpg", "MPO", save_all=True, append_images=[second])
    with Image.open(images / "a.jpg") as image:
        assert image.format == "MPO"
    assert samples(folder(images))["a"].image[0, 0, 0] > 200


# ------------------------------------------------------------------------------------------------------- lists of names


def test_a_class_list_with_a_byte_order_mark_is_read_and_latin1_is_named(images, tmp_path):
    save(images / "a.jpg")
    (tmp_path / "names.txt").write_bytes("background\nFähre\n".encode("utf-8-sig"))
    assert folder(images).classes == ("background", "Fähre")
    (tmp_path / "names.txt").write_bytes("background\nFähre\n".encode("latin1"))
    with pytest.raises(UserError, match="names.txt: byte 0xE4 in line 2 is not UTF-8; save the file as UTF-8"):
        folder(images)


@pytest.fixture
def devkit(tmp_path) -> Path:
    kit = tmp_path / "VOC2012"
    for number, name in enumerate(["cat", "dog", "person"]):
        save(kit / f"JPEGImages/2007_00000{number}.jpg")
        (kit / "Annotations").mkdir(exist_ok=True)
        objects = f"<annotation><object><name>{name}</name></object></annotation>"
        (kit / f"Annotations/2007_00000{number}.xml").write_text(objects)
    for folder_name in ("ImageSets/Segmentation", "SegmentationClass"):
        (kit / folder_name).mkdir(parents=True)
    return kit


def voc(devkit: Path, split: str, *options: str) -> Index:
    out = devkit.with_name("set")
    build.main(["voc", "--devkit", str(devkit), "--split", split, "--out", str(out), "--processes", "1", *options])
    return Index.load(out)


def test_a_split_with_a_byte_order_mark(devkit):
    (devkit / "ImageSets/Segmentation/s.txt").write_bytes("2007_000000\r\n2007_000001\r\n".encode("utf-8-sig"))
    assert [entry.name for entry in voc(devkit, "s").entries] == ["2007_000000", "2007_000001"]


def test_a_name_in_a_split_may_have_dots(devkit):
    for folder_name, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (devkit / folder_name / f"2007_000000.{suffix}").rename(devkit / folder_name / f"frame.0001.{suffix}")
    (devkit / "ImageSets/Segmentation/s.txt").write_text("frame.0001\n/JPEGImages/2007_000001.jpg /x.png\n")
    assert [entry.name for entry in voc(devkit, "s").entries] == ["frame.0001", "2007_000001"]


def test_a_list_of_image_sets_main_has_members_only(devkit, caplog):
    caplog.set_level("INFO")
    (devkit / "cat_train.txt").write_text("2007_000000  1\n2007_000001 -1\n2007_000002  0\n")
    assert [entry.name for entry in voc(devkit, str(devkit / "cat_train.txt")).entries] == ["2007_000000", "2007_000002"]
    assert f"{devkit / 'cat_train.txt'}: 1 of 3 rows are marked -1 and left out" in caplog.messages


def test_vocs_masks_in_colour_and_sbds_mat(devkit):
    scipy_io = pytest.importorskip("scipy.io")
    (devkit / "ImageSets/Segmentation/s.txt").write_text("2007_000000\n2007_000001\n")
    colours = np.array(palette(), np.uint8).reshape(256, 3)
    masks = [np.full((H, W), VOC.index(name), np.uint8) for name in ("cat", "dog")]
    Image.fromarray(colours[masks[0]]).save(devkit / "SegmentationClass/2007_000000.png")
    (devkit / "cls").mkdir()
    scipy_io.savemat(devkit / "cls/2007_000001.mat", {"GTcls": {"Segmentation": masks[1]}})
    found = samples(voc(devkit, "s", "--masks"))
    for one, mask_HW in zip(found.values(), masks, strict=True):
        np.testing.assert_array_equal(one.mask, mask_HW)


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("option", ["--images", "--labels", "--masks", "--cams"])
def test_a_path_that_does_not_exist_names_its_option(images, option, tmp_path):
    save(images / "a.jpg")
    with pytest.raises(ConfigError, match=rf"^{option} \(data.build.\w+\): {tmp_path}/nowhere does not exist$"):
        folder(images, option, str(tmp_path / "nowhere"))


def test_help_says_what_is_required_and_no_empty_defaults(capsys):
    with pytest.raises(SystemExit):
        build.main(["folder", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "directory of the images (required)" in text and "None" not in text and "images per shard (default: 256)" in text
