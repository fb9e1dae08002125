"""shards/build.py, verify.py and show.py as a user runs them, on real COCO images."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from weakclip.data.index import Index
from weakclip.data.reading import read_entry
from weakclip.data.sample import decode_sample
from weakclip.datasets.writing import build_shards
from weakclip.labels import COCO

REPO = Path(__file__).resolve().parents[2]


BLOCKER = """
import os, sys, time
from pathlib import Path
from weakclip.datasets.writing import build_shards

def load(item):
    (Path(sys.argv[1]) / f"pid-{os.getpid()}").touch()
    time.sleep(100)

if __name__ == "__main__":
    build_shards([1, 1], load, Path(sys.argv[1]) / "set", ("background", "cat"), samples_per_shard=1, processes=2)
"""


def wait_until(condition, seconds: float = 40) -> bool:
    end = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return done


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"shards/{script}.py", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=120, check=False)


def assert_one_line_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    others = re.compile(r"\[\d\d:\d\d<|^left out \d+ of \d+ images: ")  # progress bars and notices before the error
    lines = [line for line in result.stderr.splitlines() if line and not others.search(line)]
    assert result.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert all(word in lines[0] for word in words), lines[0]


@pytest.fixture(scope="module")
def split(coco_mini, tmp_path_factory) -> dict[str, Path]:
    """24 real train images, one without any annotation, and a CAM for each of the others."""
    root = tmp_path_factory.mktemp("coco")
    raw = json.loads((coco_mini / "annotations/instances_train2014.json").read_text())
    annotated = {one["image_id"] for one in raw["annotations"]}
    raw["images"] = sorted(raw["images"], key=lambda image: (image["id"] in annotated, image["id"]))[:24]
    sizes = {image["id"]: (image["height"], image["width"]) for image in raw["images"]}
    raw["annotations"] = [one for one in raw["annotations"] if one["image_id"] in sizes]
    (root / "instances.json").write_text(json.dumps(raw))
    for name in ("images", "cams"):
        (root / name).mkdir()
    rng = np.random.default_rng(0)
    for image in raw["images"]:
        shutil.copyfile(coco_mini / "train2014" / image["file_name"], root / "images" / image["file_name"])
        raw_ids = {one["category_id"] for one in raw["annotations"] if one["image_id"] == image["id"]}
        h, w = -(-image["height"] // 8), -(-image["width"] // 8)
        maps = {raw_id: rng.random((h, w), np.float32) for raw_id in raw_ids}
        if maps:
            np.save(root / "cams" / Path(image["file_name"]).with_suffix(".npy"), maps, allow_pickle=True)
    return {"images": root / "images", "annotations": root / "instances.json", "cams": root / "cams"}


def build(split: dict[str, Path], out: Path, *more: object) -> subprocess.CompletedProcess[str]:
    sources = [word for name, path in split.items() for word in (f"--{name}", path)]
    return run("build", "coco", *sources, "--cam-keys", "coco", "--samples-per-shard", 6, "--out", out, *more)


@pytest.fixture(scope="module")
def shards(split, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "set"
    result = build(split, out, "--masks", "--processes", 1)
    assert result.returncode == 0, result.stderr
    assert "left out 1 of 24 images" in result.stderr and "23 samples in 4 shards" in result.stdout
    return out


def test_the_set_holds_the_images_with_labels(split, shards):
    index = Index.load(shards)
    labelled = sorted(path.stem for path in split["cams"].iterdir())
    assert index.classes == COCO and [entry.key for entry in index.entries] == labelled
    for entry in index.entries:
        parts = read_entry(index, entry)
        assert parts["jpg"] == (split["images"] / f"{entry.key}.jpg").read_bytes()
        sample = decode_sample(parts, entry, len(COCO))
        assert sample.cam.classes == sample.classes
        assert set(np.unique(sample.mask)) <= {0, *sample.classes}


def test_the_number_of_processes_does_not_change_a_byte(split, shards, tmp_path):
    result = build(split, tmp_path / "set", "--masks", "--processes", 2)
    assert result.returncode == 0 and "images/s" in result.stderr, result.stderr
    names = sorted(path.name for path in shards.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "set").iterdir())
    assert all((shards / name).read_bytes() == (tmp_path / "set" / name).read_bytes() for name in names)


def test_a_build_that_failed_resumes_when_the_picture_is_mended(split, shards, tmp_path):
    images = shutil.copytree(split["images"], tmp_path / "images")
    broken = images / f"{max(path.stem for path in split['cams'].iterdir())}.jpg"
    good = broken.read_bytes()
    broken.write_bytes(b"no picture")
    options = ("--masks", "--processes", 1)
    assert_one_line_error(build({**split, "images": images}, tmp_path / "set", *options), str(broken), "not a JPEG, PNG or WebP")
    first = tmp_path / "set.partial" / "shard-00000.tar"
    written = first.stat().st_mtime_ns
    broken.write_bytes(good)
    result = build({**split, "images": images}, tmp_path / "set", *options)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "set" / first.name).stat().st_mtime_ns == written
    again = build({**split, "images": images}, tmp_path / "set", *options)
    assert_one_line_error(again, "already holds files")


def test_a_worker_that_dies_is_one_error(tmp_path):
    with pytest.raises(ValueError, match="a worker process was killed"):
        build_shards([1, 1], partial(os._exit), tmp_path / "set", COCO, samples_per_shard=1, processes=2)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_takes_its_processes_along_and_leaves_no_set(tmp_path):
    """Left alone they would write on, into the directory of the next build."""
    blocker = tmp_path / "block.py"
    blocker.write_text(BLOCKER)
    command = [sys.executable, blocker, tmp_path]
    parent = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(REPO)}, stderr=subprocess.DEVNULL)
    assert wait_until(lambda: len(list(tmp_path.glob("pid-*"))) == 2)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not any(is_running(int(file.name[4:])) for file in tmp_path.glob("pid-*")))
    assert (tmp_path / "set.partial").is_dir() and not (tmp_path / "set").exists()


def test_build_errors_are_one_line(split, shards, tmp_path):
    assert_one_line_error(build(split, shards), str(shards), "already holds files")
    wrong_keys = build(split, tmp_path / "set", "--cam-keys", "foreground0", "--processes", 1)
    assert_one_line_error(wrong_keys, ".npy: map of class", "is --cam-keys foreground0 wrong")
    no_cams = build({**split, "cams": tmp_path}, tmp_path / "set")
    assert_one_line_error(no_cams, f"{tmp_path}/COCO_train2014_", "make the CAM of this image")
    assert_one_line_error(build({**split, "cams": tmp_path / "none"}, tmp_path / "set"), "none")
    assert list(tmp_path.iterdir()) == []


def test_verify_passes_a_good_set_and_names_what_is_damaged(shards, tmp_path):
    good = run("verify", shards)
    assert good.returncode == 0 and "4 shards" in good.stdout and "0 problems" in good.stdout, good.stderr
    shutil.copytree(shards, tmp_path / "set")
    index = Index.load(tmp_path / "set")
    entry = index.shards[1].samples[2]
    with open(tmp_path / "set" / entry.shard, "r+b") as file:
        file.seek(entry.offset + 512 + 100)  # within the first member's data
        file.write(b"damage")
    bad = run("verify", tmp_path / "set")
    lines = [line for line in bad.stderr.splitlines() if line.startswith("error: ")]
    assert bad.returncode == 1 and len(lines) == 2 and "2 problems" in bad.stdout, bad.stderr
    assert f"{entry.shard}: SHA-256" in lines[0] and f"{entry.shard}: {entry.key}: cam.npz" in lines[1]
    (tmp_path / "set" / entry.shard).unlink()
    assert_one_line_error(run("verify", tmp_path / "set"), entry.shard, "missing", "copy it again")


def test_verify_compares_the_index_with_the_members(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "set")
    file = tmp_path / "set/index.json"
    raw = json.loads(file.read_text())
    raw["shards"][0]["samples"].pop()
    file.write_text(json.dumps(raw))
    (tmp_path / "set/shard-00009.tar").touch()
    result = run("verify", tmp_path / "set", "--processes", 1)
    assert result.returncode == 1 and "2 problems" in result.stdout
    assert "error: shard-00000.tar: its members are not those of the index" in result.stderr
    assert "error: shard-00009.tar: not in the index" in result.stderr


def test_show_draws_a_sheet(shards, tmp_path):
    result = run("show", shards, "--out", tmp_path / "sheet.png", "--start", 1, "--count", 3)
    assert result.returncode == 0 and "3 samples" in result.stdout, result.stderr
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (4 * 240, 3 * 202)  # image, CAM, seed and mask, in three rows
        assert len(sheet.getcolors(1 << 24)) > 1000
    assert_one_line_error(run("show", shards, "--out", tmp_path / "x.png", "--start", 99), "--start must be 0..")
