"""Scores of masks, seeds and CAMs on a set whose left half is class 1 (cat)."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from weakclip import evaluate
from weakclip.config import ConfigError
from weakclip.data.index import Index
from weakclip.data.sample import Cam
from weakclip.data.stream import StoredSamples
from weakclip.evaluation.scoring import score
from weakclip.masks.seeds import cam_to_seed, refined_seed
from weakclip.recipe import save

NAMES = ("background", "cat", "dog", "cow")
H, W = 48, 64
TRUTH_HW = np.repeat((np.arange(W) < W // 2).astype(np.uint8)[None], H, axis=0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_shards) -> Index:
    return make_shards(tmp_path_factory.mktemp("evaluate") / "set", 4, 2)


def samples(index: Index):
    return StoredSamples(index, index.entries, 0)


def written(folder, index: Index, mask_HW: np.ndarray):
    folder.mkdir(exist_ok=True)
    for entry in index.entries:
        Image.fromarray(mask_HW).save(folder / f"{entry.key}.png")
    return folder


def test_a_crf_finds_in_the_picture_what_the_cam_has_missed(tmp_path, make_shards, png_of, tiny_config):
    """The CAM is sure of the left edge alone; the object's half of the picture is bright, the rest dark."""
    cam_HW = np.where(np.arange(W) < W // 8, 255, 51).astype(np.uint8)[None].repeat(H, axis=0)
    picture = png_of(np.stack([TRUTH_HW * 200] * 3, axis=2))
    index = make_shards(tmp_path / "set", 2, image=picture, cam=Cam((1,), cam_HW[None], 1.0), seed=None)
    config = tiny_config("pseudo.crf={bilateral_sxy: 40, bilateral_srgb: 10, bilateral_compat: 10}", "pseudo.processes=0")
    scores = {what: evaluate.run(config, what, str(index.root), None, tmp_path).miou for what in ("cam", "cam_crf")}
    assert scores["cam"] < 0.5 and scores["cam_crf"] > 0.95


def test_the_score_of_cams_after_a_crf_needs_its_setting(shards, tiny_config, tmp_path):
    with pytest.raises(ConfigError, match="pseudo.crf is null; set it to the CRF that --what cam_crf applies"):
        evaluate.run(tiny_config("pseudo.crf=null"), "cam_crf", str(shards.root), None, tmp_path)


@pytest.mark.parametrize("processes", [0, 2])
def test_seeds_are_scored_as_training_uses_them_with_the_crf_that_is_set(
    tmp_path, make_shards, png_of, tiny_config, capsys, processes
):
    """The CAM is sure of the left edge alone, and the object's half of the picture is bright: the CRF finds the rest of it."""
    cam_HW = np.where(np.arange(W) < W // 8, 255, 51).astype(np.uint8)[None].repeat(H, axis=0)
    picture_HW3 = np.stack([TRUTH_HW * 200] * 3, axis=2)
    index = make_shards(tmp_path / "set", 2, image=png_of(picture_HW3), cam=Cam((1,), cam_HW[None], 1.0), seed=None)
    plain = (f"data.train={index.root}", "seeds.background=0.22", "seeds.foreground=0.25", f"pseudo.processes={processes}")
    crf = "seeds.crf={iterations: 5, bilateral_sxy: 40, bilateral_srgb: 10, bilateral_compat: 10}"
    maps_nHW = cam_HW[None].astype(np.float32) / 255
    wanted_HW = {
        (): cam_to_seed(maps_nHW, (1,), 0.22, 0.25),
        (crf,): refined_seed(maps_nHW, (1,), picture_HW3, 0.22, 0.25, tiny_config(crf).seeds.crf),
    }
    found = {}
    for more, seed_HW in wanted_HW.items():
        save(tiny_config(*plain, *more), tmp_path / "recipe.yaml")
        evaluate.main(["--config", str(tmp_path / "recipe.yaml"), "--what", "seeds", "--out", str(tmp_path / "scores.json")])
        found[more] = json.loads((tmp_path / "scores.json").read_text())
        wanted = score(samples(index), lambda _, seed_HW=seed_HW: seed_HW, NAMES).as_dict()
        assert found[more] == wanted | {"masks": None}
    assert found[()]["miou"] < 50 and found[crf,]["miou"] > 90


# ----------------------------------------------------------------------------------------------------------------------- files


def test_masks_seeds_and_cams_of_a_set_are_scored(shards, tiny_config, tmp_path, capsys):
    config, data = tiny_config(), str(shards.root)
    masks = written(tmp_path / "masks", shards, TRUTH_HW)
    for what in ("masks", "seeds", "cam"):
        assert evaluate.run(config, what, data, None, masks).miou == 1.0
    printed = capsys.readouterr().out
    assert printed.startswith("best threshold 0.") and printed.count(":100.00*") == 1
    assert max(map(len, printed.splitlines())) <= 100
    written(masks, shards, np.zeros_like(TRUTH_HW))
    assert evaluate.run(config, "masks", data, None, masks).iou[:2] == (0.5, 0.0)


def test_a_missing_mask_stops_the_score(shards, tiny_config, tmp_path):
    masks = written(tmp_path / "masks", shards, TRUTH_HW)
    (masks / "image_3.png").unlink()
    assert evaluate.run(tiny_config(), "masks", str(shards.root), "0", masks).miou == 1.0  # not in this shard
    with pytest.raises(ValueError, match="image_3.png: missing"):
        evaluate.run(tiny_config(), "masks", str(shards.root), None, masks)


def test_the_command_writes_json_with_nulls_and_prints_the_table(shards, tiny_config, tmp_path, capsys):
    save(tiny_config(f"data.train={shards.root}"), tmp_path / "recipe.yaml")
    evaluate.main(["--config", str(tmp_path / "recipe.yaml"), "--what", "seeds", "--shards", "0:1"])
    out = tmp_path / "run/scores-seeds.json"
    assert json.loads(out.read_text())["iou"] == {"background": 100.0, "cat": 100.0, "dog": None, "cow": None}
    assert [path.name for path in out.parent.iterdir()] == ["scores-seeds.json"]
    printed = capsys.readouterr().out
    assert re.search(r"^mean( +100\.00){4}$", printed, re.MULTILINE) and printed.endswith(f"written: {out}\n")


def test_the_command_writes_the_curve_of_cams(shards, tiny_config, tmp_path):
    save(tiny_config(f"data.train={shards.root}"), tmp_path / "recipe.yaml")
    evaluate.main(["--config", str(tmp_path / "recipe.yaml"), "--what", "cam"])
    found = json.loads((tmp_path / "run/scores-cam.json").read_text())
    assert list(found["thresholds"]) == [f"{0.05 * step:.2f}" for step in range(1, 20)]
    assert found["thresholds"][f"{found['threshold']:.2f}"] == max(found["thresholds"].values()) == found["miou"] == 100.0
    assert found["mean_boundary_iou"] == 100.0


def test_the_command_takes_other_folders(shards, tiny_config, tmp_path):
    save(tiny_config(), tmp_path / "recipe.yaml")
    masks = written(tmp_path / "masks", shards, TRUTH_HW)
    out = tmp_path / "new/scores.json"
    where = ["--masks", str(masks), "--data", str(shards.root), "--out", str(out)]
    evaluate.main(["--config", str(tmp_path / "recipe.yaml"), *where])
    assert json.loads(out.read_text())["miou"] == 100.0
