"""The shard commands on a VOC development kit, a folder and foreign tars, as a user types them. All data is synthetic."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.integration.test_shards_cli import assert_one_line_error, run
from weakclip.config import SeedConfig
from weakclip.data.index import Index, ShardError
from weakclip.data.reading import read_entry
from weakclip.data.sample import decode_sample
from weakclip.datasets import build, reshard, stats, verify
from weakclip.labels import COCO, VOC

H, W = 40, 60
KEYS = [f"2007_00000{number}" for number in range(6)]
LABELS = {"2007_000000": [], **{key: ["sofa", "cow"][: 1 + n % 2] for n, key in enumerate(KEYS[1:])}}
SOFA, COW = VOC.index("sofa"), VOC.index("cow")


def xml(names: list[str]) -> str:
    return f"<annotation>{''.join(f'<object><name>{name}</name></object>' for name in names)}</annotation>"


def left_half(index: int) -> np.ndarray:
    mask_HW = np.zeros((H, W), np.uint8)
    mask_HW[:, : W // 2] = index
    return mask_HW


@pytest.fixture(scope="module")
def devkit(tmp_path_factory) -> Path:
    """VOC2012 of six trainaug images and a test image, and beside it their CAMs: the left half for the first class."""
    root = tmp_path_factory.mktemp("voc") / "VOCdevkit/VOC2012"
    for name in ("JPEGImages", "Annotations", "ImageSets/Segmentation", "SegmentationClassAug", "../../cams"):
        (root / name).mkdir(parents=True)
    (root / "ImageSets/Segmentation/trainaug.txt").write_text("\n".join(KEYS))
    (root / "ImageSets/Segmentation/test.txt").write_text("2008_000001\n")
    for number, key in enumerate([*KEYS, "2008_000001"]):
        pixels = np.random.default_rng(number).integers(0, 256, (H, W, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"JPEGImages/{key}.jpg")
    for key, names in LABELS.items():
        (root / f"Annotations/{key}.xml").write_text(xml(names))
        Image.fromarray(left_half(SOFA)).save(root / f"SegmentationClassAug/{key}.png")
        maps = {VOC.index(name) - 1: left_half(1)[::2, ::2] * np.float32(1 - n) for n, name in enumerate(names)}
        if maps:
            np.save(root / f"../../cams/{key}.npy", maps, allow_pickle=True)
    return root


def typed(command, *arguments: object) -> None:
    """Runs a command in this process, which saves it seconds of imports."""
    command.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trainaug(devkit, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "trainaug"
    options = ("--split", "trainaug", "--cams", devkit / "../../cams", "--masks", "--samples-per-shard", 2, "--processes", 1)
    result = run("build", "voc", "--devkit", devkit, "--out", out, *options)
    assert result.returncode == 0 and "images/s" in result.stderr, result.stderr
    assert "left out 1 of 6 images: they have no label of the 20 classes" in result.stderr
    assert f"{out}: 5 samples in 3 shards" in result.stdout
    return out


def samples(root: Path) -> dict:
    index = Index.load(root)
    return {entry.key: decode_sample(read_entry(index, entry), entry, len(index.classes)) for entry in index.entries}


def test_a_set_of_voc(trainaug):
    assert Index.load(trainaug).classes == VOC
    got = samples(trainaug)
    assert list(got) == KEYS[1:]
    assert {key: [VOC[index] for index in sample.classes] for key, sample in got.items()} == {
        key: sorted(names) for key, names in LABELS.items() if names
    }
    assert all((sample.mask == left_half(SOFA)).all() for sample in got.values())
    assert verify.verify(Index.load(trainaug), 1)[0] == []


def test_a_set_of_voc_in_cocos_classes(devkit, tmp_path):
    options = ("--split", "trainaug", "--cams", devkit / "../../cams", "--masks", "--classes", "coco", "--processes", 1)
    typed(build, "voc", "--devkit", devkit, "--out", tmp_path / "set", *options)
    assert Index.load(tmp_path / "set").classes == COCO
    got = samples(tmp_path / "set")
    couch, cow = COCO.index("couch"), COCO.index("cow")
    assert [sample.classes for sample in got.values()] == [(couch,), (cow, couch), (couch,), (cow, couch), (couch,)]
    assert all(sample.cam.classes == sample.classes for sample in got.values())
    assert all((sample.mask == left_half(couch)).all() for sample in got.values())


def test_the_test_split_has_images_alone(devkit, tmp_path):
    source = ("voc", "--devkit", devkit, "--split", "test", "--processes", 1)
    typed(build, *source, "--out", tmp_path / "set")
    (sample,) = samples(tmp_path / "set").values()
    assert (sample.name, sample.classes, sample.cam, sample.mask) == ("2008_000001", (), None, None)
    result = run("build", *source, "--out", tmp_path / "other", "--cams", devkit / "../../cams")
    assert_one_line_error(result, "2008_000001.jpg", "leave --cams out")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_set_of_a_folder(devkit, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "names.txt").write_text("background\ncow\nairplane\n")
    rows = [f"{key}.jpg,cow" for key in KEYS[:3]] + [f"{KEYS[0]}.jpg,aeroplane", f"{KEYS[3]}.jpg,", "2008_000001.jpg,"]
    (tmp_path / "labels.csv").write_text("\n".join(["file,labels", *rows, *(f"{key}.jpg,cow" for key in KEYS[4:])]))
    source = ("folder", "--images", devkit / "JPEGImages", "--labels", tmp_path / "labels.csv", "--processes", 1)
    typed(build, *source, "--classes", tmp_path / "names.txt", "--out", tmp_path / "set")
    assert "left out 2 of 7 images" in caplog.text
    assert [sample.classes for sample in samples(tmp_path / "set").values()] == [(1, 2), (1,), (1,), (1,), (1,)]
    (tmp_path / "labels.csv").write_text("name,labels\n")
    assert_one_line_error(run("build", *source, "--classes", "voc", "--out", tmp_path / "other"), "labels.csv: line 1")
    assert not list(tmp_path.glob("other*"))


def test_stats_of_a_set(trainaug, tmp_path):
    result = run("stats", trainaug, "--json", tmp_path / "stats.json", "--processes", 1)
    assert result.returncode == 0 and "images/s" in result.stderr, result.stderr
    got = json.loads((tmp_path / "stats.json").read_text())
    assert (got["images"], got["shards"]) == (5, 3)
    assert got["bytes"] == sum(path.stat().st_size for path in trainaug.glob("*.tar"))
    assert got["height"] == dict.fromkeys(stats.LEVELS, H) and got["width"] == dict.fromkeys(stats.LEVELS, W)
    assert got["images a shard"]["smallest"] == 1 and got["images a shard"]["largest"] == 2
    assert got["having"] == {"labels": 5, "CAM": 5, "seed": 0, "mask": 5}
    classes = {one["name"]: one for one in got["classes"]}
    assert list(classes) == list(VOC[1:])
    # The maps have half the size, so their edge may be half a pixel off the edge of the seed.
    half = pytest.approx(0.5, abs=1 / W)
    assert classes["sofa"] == {"name": "sofa", "images": 5, "share": 1, "maps": 5, "covered": half, "empty": 0}
    assert classes["cow"] == {"name": "cow", "images": 2, "share": 0.4, "maps": 2, "covered": 0, "empty": 2}
    assert classes["dog"] == {"name": "dog", "images": 0, "share": 0, "maps": 0, "covered": None, "empty": 0}
    assert got["seeds"] == {"background": pytest.approx(1 - classes["sofa"]["covered"]), "ignored": 0}
    assert "sofa" in result.stdout and result.stdout.startswith(f"{trainaug}: 5 images in 3 shards")


def test_stats_of_seeds_and_of_images_alone(make_shards, tmp_path):
    seeds = stats.stats(make_shards(tmp_path / "seeds", cam=None), 1, SeedConfig())
    assert seeds["having"] == {"labels": 7, "CAM": 0, "seed": 7, "mask": 7}
    assert seeds["classes"][0] == {"name": "cat", "images": 7, "share": 1, "maps": 0, "covered": 0.5, "empty": 0}
    alone = stats.stats(make_shards(tmp_path / "alone", cam=None, seed=None, mask=None, classes=()), 1, SeedConfig())
    assert set(alone["having"].values()) == {0} and set(alone["seeds"].values()) == {None}
    assert [str(table) for table in stats.tables(alone)]


def test_resharding_keeps_order_and_members(trainaug, tmp_path):
    result = run("reshard", trainaug, "--out", tmp_path / "four", "--samples-per-shard", 4, "--processes", 2)
    assert result.returncode == 0 and "5 samples in 2 shards" in result.stdout, result.stderr
    before, after = Index.load(trainaug), Index.load(tmp_path / "four")
    assert [len(shard.samples) for shard in after.shards] == [4, 1] and after.classes == before.classes
    assert [e.key for e in after.entries] == [e.key for e in before.entries]
    pairs = zip(before.entries, after.entries, strict=True)
    assert all(read_entry(before, one) == read_entry(after, other) for one, other in pairs)
    back = reshard.reshard(str(tmp_path / "four"), tmp_path / "two", 2, 1)
    assert back.shards == before.shards


def test_resharding_puts_masks_in_as_seeds(make_shards, tmp_path, png_of):
    before = make_shards(tmp_path / "set", count=3)
    (tmp_path / "masks").mkdir()
    pngs = {entry.key: png_of(np.full((48, 64), number, np.uint8)) for number, entry in enumerate(before.entries)}
    for key, png in pngs.items():
        (tmp_path / f"masks/{key}.png").write_bytes(png)
    source = (tmp_path / "set", "--seeds", tmp_path / "masks", "--processes", 1)
    typed(reshard, *source, "--out", tmp_path / "seeded")
    after = Index.load(tmp_path / "seeded")
    assert verify.verify(after, 1)[0] == []
    for one, other in zip(before.entries, after.entries, strict=True):
        assert read_entry(after, other) == read_entry(before, one) | {"seed.png": pngs[one.key]}

    (tmp_path / "masks/image_2.png").write_bytes(png_of(np.zeros((48, 48), np.uint8)))
    assert_one_line_error(run("reshard", *source, "--out", tmp_path / "other"), "masks/image_2.png: image_2: seed.png")
    (tmp_path / "masks/image_2.png").unlink()
    assert_one_line_error(run("reshard", *source, "--out", tmp_path / "other"), "masks/image_2.png")
    assert not list(tmp_path.glob("other*"))


def test_foreign_tars_become_a_set(devkit, trainaug, tmp_path):
    """Unpacked, and packed again by GNU tar: two folders in one tar, in the order of names from the end, and an empty tar."""
    for number, shard in enumerate(Index.load(trainaug).shards):
        (tmp_path / f"files/{number}").mkdir(parents=True)
        subprocess.run(["tar", "-xf", trainaug / shard.name, "-C", tmp_path / f"files/{number}"], check=True)
    names = sorted((str(path.relative_to(tmp_path / "files")) for path in (tmp_path / "files").rglob("*.*")), reverse=True)
    (tmp_path / "tars").mkdir()
    for name, chosen in (("x.tar", [n for n in names if n[0] != "0"]), ("y.tar", ["0"]), ("z.tar", ["-T", "/dev/null"])):
        subprocess.run(["tar", "-cf", tmp_path / "tars" / name, "-C", tmp_path / "files", *chosen], check=True)
    source = (tmp_path / "tars", "--out", tmp_path / "set", "--processes", 1)
    assert_one_line_error(run("reshard", *source), "tars: has no index.json, so --classes")
    typed(reshard, *source, "--classes", "voc", "--samples-per-shard", 3)
    want, got = Index.load(trainaug), Index.load(tmp_path / "set")
    parts_of = {entry.key: read_entry(want, entry) for entry in want.entries}
    assert {entry.key: read_entry(got, entry) for entry in got.entries} == parts_of
    assert [entry.key for entry in got.entries][:3] == [*KEYS[5:2:-1]]  # those of x.tar, from the end
    assert verify.verify(got, 1)[0] == []


def test_mistakes_of_resharding_leave_nothing(trainaug, tmp_path):
    with pytest.raises(ValueError, match="--classes voc: .*leave --classes out"):
        typed(reshard, trainaug, "--out", tmp_path / "set", "--classes", "voc")
    (tmp_path / "tars").mkdir()
    data = (trainaug / Index.load(trainaug).shards[0].name).read_bytes()
    for name in ("x.tar", "y.tar"):
        (tmp_path / "tars" / name).write_bytes(data)
    source = (tmp_path / "tars", "--out", tmp_path / "set", "--classes", "voc", "--processes", 1)
    with pytest.raises(ShardError, match=f"x.tar: {KEYS[1]}: is in y.tar too"):
        typed(reshard, *source)
    with pytest.raises(ValueError, match="--seeds .*tars: .*tars has no index.json; first make a shard set of it"):
        typed(reshard, *source, "--seeds", tmp_path / "tars")
    (tmp_path / "tars/y.tar").unlink()
    (tmp_path / "tars/x.tar").write_bytes(data.replace(b'"classes": [18]', b'"classes": [81]'))
    assert_one_line_error(run("reshard", *source), "x.tar: ", "81", "within 1..20")
    assert not list(tmp_path.glob("set*"))
