"""Images with an EXIF orientation, from build to the decoded sample, compared with PIL.ImageOps.exif_transpose."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from weakclip.config import ConfigError
from weakclip.data.index import Index, ShardError
from weakclip.data.reading import load, read_entry
from weakclip.data.sample import DecodedSample, open_sample
from weakclip.datasets import build
from weakclip.labels import COCO, VOC

H, W = 40, 64
RNG = np.random.default_rng(0)
IMAGE_HW3 = np.kron(RNG.integers(0, 256, (H // 8, W // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
MASK_HW = RNG.choice(np.array([0, 8, 12, 255], np.uint8), (H, W))  # cat, dog
MAPS = {name: RNG.random((H // 2, W // 2)).astype(np.float32) for name in ("cat", "dog")}


def with_orientation(image: Image.Image, orientation: int) -> Image.Image:
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return image


def transposed(array: np.ndarray, orientation: int) -> np.ndarray:
    """What Pillow makes of an array as an image with this orientation."""
    return np.asarray(ImageOps.exif_transpose(with_orientation(Image.fromarray(array), orientation)))


def save(image_HW3: np.ndarray, path: Path, orientation: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = with_orientation(Image.fromarray(image_HW3), orientation)
    image.save(path, exif=image.getexif(), **({"quality": 95} if path.suffix == ".jpg" else {}))
    return path


class Folder:
    """A folder of one image, its CSV, masks and CAMs. `upright`: masks and CAMs follow the upright image."""

    source, images, names = "folder", "images", VOC

    def __init__(self, root: Path, suffix: str, orientation: int, upright: bool = False) -> None:
        self.root, self.orientation = root, orientation
        self.image = save(IMAGE_HW3, root / self.images / f"2007_000001{suffix}", orientation)
        turned = (lambda array: transposed(array, orientation)) if upright else lambda array: array
        (root / "cams").mkdir(parents=True)
        maps = {self.names.index(name) - 1: turned(map_hw) for name, map_hw in MAPS.items()}
        np.save(root / "cams/2007_000001.npy", maps, allow_pickle=True)
        self.annotate(turned(MASK_HW))

    def annotate(self, mask_HW: np.ndarray) -> None:
        (self.root / "masks").mkdir()
        Image.fromarray(mask_HW).save(self.root / "masks/2007_000001.png")
        with open(self.root / "labels.csv", "w", newline="") as file:
            csv.writer(file).writerows([("file", "labels"), (self.image.name, "cat;dog")])

    def options(self) -> list[str]:
        root = self.root
        given = {"--images": root / "images", "--labels": root / "labels.csv", "--masks": root / "masks", "--classes": "voc"}
        return [str(part) for pair in given.items() for part in pair]

    def build(self, exif: str | None, *more: str, name: str = "set") -> DecodedSample:
        out = self.root / name
        options = [*self.options(), "--cams", str(self.root / "cams"), "--out", str(out), *more, "--processes", "1"]
        build.main([self.source, *options, *(["--exif", exif] if exif else [])])
        index = Index.load(out)
        self.parts, (self.entry,) = read_entry(index, index.entries[0]), index.entries
        return load(index, self.entry)


class Voc(Folder):
    """The same in the layout of VOC's development kit."""

    source, images = "voc", "VOC2012/JPEGImages"

    def annotate(self, mask_HW: np.ndarray) -> None:
        kit = self.root / "VOC2012"
        for folder in ("SegmentationClass", "Annotations", "ImageSets/Segmentation"):
            (kit / folder).mkdir(parents=True)
        Image.fromarray(mask_HW).save(kit / "SegmentationClass/2007_000001.png")
        objects = "".join(f"<object><name>{name}</name></object>" for name in ("cat", "dog"))
        (kit / "Annotations/2007_000001.xml").write_text(f"<annotation>{objects}</annotation>")
        (kit / "ImageSets/Segmentation/train.txt").write_text("2007_000001\n")

    def options(self) -> list[str]:
        return ["--devkit", str(self.root / "VOC2012"), "--split", "train", "--masks"]


class Coco(Folder):
    """The same as a COCO file, whose masks are run lengths. They cannot hold 255."""

    source, names = "coco", COCO

    def annotate(self, mask_HW: np.ndarray) -> None:
        runs = [{"size": list(mask_HW.shape), "counts": runs_of(mask_HW == index)} for index in (8, 12)]
        self.write(mask_HW.shape, [(1, runs[0]), (2, runs[1])])

    def write(self, size_HW: tuple[int, ...], segments: list) -> None:
        image = {"id": 1, "file_name": self.image.name, "height": size_HW[0], "width": size_HW[1]}
        drawn = [{"image_id": 1, "category_id": number, "segmentation": segment} for number, segment in segments]
        categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        (self.root / "a.json").write_text(json.dumps({"images": [image], "annotations": drawn, "categories": categories}))

    def options(self) -> list[str]:
        given = ["--images", str(self.root / "images"), "--annotations", str(self.root / "a.json"), "--masks"]
        return [*given, "--classes", "voc", "--cam-keys", "foreground0"]


def runs_of(inside_HW: np.ndarray) -> list[int]:
    """COCO's run lengths: column by column, of outside and inside in turns."""
    flat = inside_HW.ravel("F")
    ends = np.flatnonzero(np.diff(np.concatenate([[0], flat.astype(int), [2]])))
    return np.diff(np.concatenate([[0], ends])).tolist()


def expected(data_set: Folder, orientation: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Image, mask and maps, turned by Pillow. Decoding comes first: a JPEG is not what was saved."""
    mask_HW = np.where(MASK_HW == 255, 0, MASK_HW) if data_set.source == "coco" else MASK_HW
    with Image.open(data_set.image) as image:
        pixels_HW3 = np.array(image.convert("RGB"))
    maps = [np.rint(map_hw * 255).astype(np.uint8) for map_hw in MAPS.values()]
    return (transposed(pixels_HW3, orientation), transposed(mask_HW, orientation), [transposed(one, orientation) for one in maps])


def assert_sample(found: DecodedSample, want: tuple[np.ndarray, np.ndarray, list[np.ndarray]]) -> None:
    image_HW3, mask_HW, maps = want
    np.testing.assert_array_equal(found.image, image_HW3)
    np.testing.assert_array_equal(found.mask, mask_HW)
    np.testing.assert_array_equal(found.cam.maps_nhw, np.stack(maps))


KINDS = [Folder, Voc, Coco]
FILES = [(Folder, ".jpg"), (Folder, ".png"), (Voc, ".jpg"), (Coco, ".jpg"), (Coco, ".png")]  # VOC's images are JPEGs


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind, suffix", FILES)
def test_all_eight_orientations_stored_and_upright(tmp_path, kind, orientation, suffix):
    data_set = kind(tmp_path, suffix, orientation)
    assert_sample(data_set.build(None), expected(data_set, 1))
    assert_sample(data_set.build("upright", name="upright"), expected(data_set, orientation))
    assert data_set.parts[suffix[1:]] == data_set.image.read_bytes()
    opened = open_sample(data_set.parts, data_set.entry, len(VOC))
    np.testing.assert_array_equal(opened.image, expected(data_set, orientation)[0])
    H2, W2 = opened.decode_picture((opened.size[0] // 2, opened.size[1] // 2)).shape[:2]
    assert (H2 > W2) == (opened.size[0] > opened.size[1])


@pytest.mark.parametrize("orientation", range(5, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_the_upright_size_are_not_turned(tmp_path, kind, orientation):
    data_set = kind(tmp_path, ".jpg", orientation, upright=True)
    assert_sample(data_set.build("upright"), expected(data_set, orientation))
    with pytest.raises(ShardError, match=f"EXIF orientation {orientation}: the size .* build with --exif upright"):
        data_set.build("stored", name="stored")
    assert not (tmp_path / "stored").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_one_line_counts_the_images_and_says_what_is_done(tmp_path, kind, caplog):
    caplog.set_level("INFO")
    data_set = kind(tmp_path, ".jpg", 6)
    data_set.build("stored")
    (line,) = [message for message in caplog.messages if "EXIF" in message]
    assert line.startswith("1 images: the image has an EXIF orientation and is used as it is stored; --exif upright turns it")
    caplog.clear()
    data_set.build("upright", name="upright")
    (line,) = [message for message in caplog.messages if "EXIF" in message]
    assert (
        line.startswith(
            "1 of 1 images are turned upright by their EXIF orientation; each mask follows the stored image; each cam follows"
        )
        and line.count("stored") == 2
    )
    caplog.clear()
    kind(tmp_path / "plain", ".jpg", 1).build("upright")
    assert not [message for message in caplog.messages if "EXIF" in message]


def test_polygons_in_the_upright_frame_with_the_stored_size(tmp_path, caplog):
    """As Label Studio exports a phone's photo."""
    data_set = Coco(tmp_path, ".jpg", 6)
    data_set.write((H, W), [(2, [[5, 30, 35, 30, 35, 60, 5, 60]])])
    options = ["--images", str(tmp_path / "images"), "--annotations", str(tmp_path / "a.json"), "--masks", "--classes", "voc"]
    build.main(["coco", *options, "--out", str(tmp_path / "stored")])
    assert "1 images have polygons beyond their size, such as 2007_000001; if" in caplog.text and "--exif upright" in caplog.text
    caplog.clear()
    build.main(["coco", *options, "--out", str(tmp_path / "upright"), "--exif", "upright"])
    index = Index.load(tmp_path / "upright")
    mask_HW = load(index, index.entries[0]).mask
    assert mask_HW.shape == (W, H) and (mask_HW[30:60, 5:35] == 12).all() and (mask_HW == 12).sum() == 30 * 30
    assert "beyond" not in caplog.text


def coco_set(root: Path, *images: tuple[int, list]) -> list[str]:
    """COCO options for images of (orientation, polygons), all listed with the stored size."""
    listed, drawn = [], []
    for number, (orientation, polygons) in enumerate(images):
        save(IMAGE_HW3, root / f"images/{number}.jpg", orientation)
        listed.append({"id": number, "file_name": f"./{number}.jpg", "height": H, "width": W})
        drawn += [{"image_id": number, "category_id": 1, "segmentation": polygons}]
    categories = [{"id": 1, "name": "cat"}]
    (root / "a.json").write_text(json.dumps({"images": listed, "annotations": drawn, "categories": categories}))
    return [
        "coco",
        "--images",
        str(root / "images"),
        "--annotations",
        str(root / "a.json"),
        "--masks",
        "--out",
        str(root / "set"),
    ]


STORED_ONLY = [[50, 5, 60, 5, 60, 30, 50, 30]]
UPRIGHT_ONLY = [[5, 50, 30, 50, 30, 60, 5, 60]]
BEYOND_BOTH = [[5, 5, 70, 5, 70, 30, 5, 30]]
WITHIN_BOTH = [[5, 5, 30, 5, 30, 30, 5, 30]]


@pytest.mark.parametrize(
    "images, frame",
    [
        ([(6, BEYOND_BOTH), (6, STORED_ONLY)], "stored"),
        ([(3, UPRIGHT_ONLY), (6, STORED_ONLY)], "stored"),
        ([(6, WITHIN_BOTH), (8, WITHIN_BOTH)], "stored"),
        ([(6, WITHIN_BOTH), (6, UPRIGHT_ONLY)], "upright"),
    ],
)
def test_only_polygons_that_fit_one_frame_decide(tmp_path, caplog, images, frame):
    caplog.set_level("INFO")
    build.main([*coco_set(tmp_path, *images), "--exif", "upright"])
    assert f"each mask follows the {frame} image" in caplog.text
    index = Index.load(tmp_path / "set")
    for entry, (orientation, polygons) in zip(index.entries, images, strict=True):
        left, top, right, bottom = *polygons[0][:2], polygons[0][2], polygons[0][5]
        drawn_HW = np.zeros((H, W) if frame == "stored" else transposed(MASK_HW, orientation).shape, np.uint8)
        drawn_HW[top:bottom, left:right] = COCO.index("cat")
        want_HW = transposed(drawn_HW, orientation) if frame == "stored" else drawn_HW
        np.testing.assert_array_equal(load(index, entry).mask, want_HW)


def test_polygons_that_contradict_each_other_are_an_error(tmp_path):
    with pytest.raises(
        ShardError, match="two kinds of mask: that of .*0.jpg follows the stored pixels, that of .*1.jpg the upright"
    ):
        build.main([*coco_set(tmp_path, (6, STORED_ONLY), (6, UPRIGHT_ONLY)), "--exif", "upright"])


def test_run_lengths_of_the_other_frame_name_exif(tmp_path):
    data_set = Coco(tmp_path, ".jpg", 6)
    data_set.write((H, W), [(number, {"size": [W, H], "counts": [H * W]}) for number in (1, 2)])
    for exif in ("stored", "upright"):
        with pytest.raises(ShardError, match=r"size is \[64, 40\], .*the image has EXIF orientation 6, see --exif"):
            data_set.build(exif)


def test_a_small_cam_of_the_other_frame_is_seen_by_its_proportions(tmp_path, caplog):
    """Maps below a quarter of the image are enlarged to its proportions, whatever theirs are."""
    data_set = Folder(tmp_path, ".jpg", 6)
    small_hw = np.zeros((W // 4 // 2, H // 4 // 2), np.float32)
    small_hw[0] = 1  # the upper end of the upright image
    np.save(tmp_path / "cams/2007_000001.npy", {7: small_hw, 11: small_hw}, allow_pickle=True)
    with pytest.raises(ShardError, match=r"maps of \(8, 5\) do not fit .*build with --exif upright"):
        data_set.build("stored")
    shutil.rmtree(tmp_path / "set.partial", ignore_errors=True)
    maps_nhw = data_set.build("upright").cam.maps_nhw
    assert maps_nhw[:, 0].min() > 200 and not maps_nhw[:, -1].any()


def test_parts_built_by_jobs_with_other_hash_seeds_make_one_set(tmp_path):
    options = [*coco_set(tmp_path, (6, STORED_ONLY), (8, STORED_ONLY), (1, STORED_ONLY))[1:-2], "--classes", "coco"]
    recipe = {"source": "coco", "images": options[1], "annotations": options[3], "masks": True, "exif": "upright"}
    (tmp_path / "cams").mkdir()
    for number in range(3):
        np.save(tmp_path / f"cams/{number}.npy", {15: np.ones((H, W), np.float32)}, allow_pickle=True)
    recipe |= {"samples_per_shard": 1, "cams": str(tmp_path / "cams")}
    program = (
        "import sys, json; from weakclip.config import BuildConfig; from weakclip.datasets import build as b;"
        "from pathlib import Path; given = BuildConfig(**json.loads(sys.argv[1]));"
        "planned = b.ready(b.plan(given, Path(sys.argv[2]), 'coco'), given);"
        "planned.run(1, range(int(sys.argv[3]), int(sys.argv[3]) + 1))"
    )
    for number in range(3):
        command = [sys.executable, "-c", program, json.dumps(recipe), str(tmp_path / "set"), str(number)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": str(number)})
    assert len(Index.load(tmp_path / "set").entries) == 3


def test_masks_of_both_frames_are_an_error_and_none_that_tells_a_warning(tmp_path, caplog):
    one = Folder(tmp_path, ".jpg", 6)
    save(IMAGE_HW3, tmp_path / "images/b.jpg", 6)
    Image.fromarray(transposed(MASK_HW, 6)).save(tmp_path / "masks/b.png")
    images, masks = ["--images", str(tmp_path / "images"), "--classes", "voc"], ["--masks", str(tmp_path / "masks")]
    with pytest.raises(
        ShardError, match="--exif upright: two kinds of mask: that of .*1.jpg follows the stored pixels, that of .*b.jpg"
    ):
        build.main(["folder", *images, *masks, "--out", str(tmp_path / "set"), "--exif", "upright"])
    (tmp_path / "images/b.jpg").unlink()
    save(IMAGE_HW3, one.image, 3)
    build.main(["folder", *images, *masks, "--out", str(tmp_path / "set"), "--exif", "upright"])
    assert "the sizes do not show whether each mask follows the stored pixels; it is turned" in caplog.text


def test_the_rule_is_part_of_what_a_set_was_made_from(tmp_path):
    data_set = Folder(tmp_path, ".jpg", 6)
    data_set.build("upright")
    assert json.loads((tmp_path / "set/build.json").read_text())["exif"] == "upright"
    with pytest.raises((ConfigError, SystemExit)):
        data_set.build("sideways")
