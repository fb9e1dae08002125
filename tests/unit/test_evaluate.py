"""Scores of masks, seeds and CAMs on a set whose left half is class 1 (cat)."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from weakclip import evaluate
from weakclip.config import ConfigError, save
from weakclip.data.index import Index
from weakclip.data.sample import Cam
from weakclip.data.stream import StoredSamples
from weakclip.evaluation.metrics import confusion
from weakclip.masks import mask_folder

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


def test_the_truth_scores_100_and_absent_classes_are_null(shards):
    scores = evaluate.score(samples(shards), lambda sample: sample.mask, NAMES).as_dict()
    for mean, each in (
        ("miou", "iou"),
        ("mean_precision", "precision"),
        ("mean_recall", "recall"),
        ("mean_boundary_iou", "boundary_iou"),
    ):
        assert scores.pop(mean) == 100.0
        assert scores.pop(each) == {"background": 100.0, "cat": 100.0, "dog": None, "cow": None}
    assert not scores


def test_boundaries_are_scored_over_all_samples_together(shards):
    """48 x 64: boundaries are 2 pixels wide. In one of four images the cat, 48 x 32, is missing."""
    found = evaluate.score(samples(shards), lambda sample: sample.mask * (sample.key != "image_2"), NAMES)
    half, whole = 48 * 32 - 44 * 28, 48 * 64 - 44 * 60
    both = 4 * 32 + 2 * 44  # the half's three sides that are the image's
    assert found.boundary_iou[:2] == ((3 * half + both) / (3 * half + half + whole - both), 3 / 4)


def test_a_prediction_is_scored_over_all_samples_together(shards):
    """Three of four images right, one all background: cat 3 / 4, background 4 / 5 (of half images)."""
    scores = evaluate.score(samples(shards), lambda s: s.mask * (s.key != "image_2"), NAMES)
    assert scores.iou[:2] == pytest.approx((4 / 5, 3 / 4)) and scores.miou == pytest.approx((0.8 + 0.75) / 2)


def test_ignored_predictions_count_as_background(shards):
    """A quarter of the width is ignored in each half: cat is half found; background has a false quarter."""
    prediction_HW = TRUTH_HW.copy()
    prediction_HW[:, W // 4 : 3 * W // 4] = 255
    scores = evaluate.score(samples(shards), lambda _: prediction_HW, NAMES)
    assert scores.iou[:2] == pytest.approx((2 / 3, 1 / 2))


def test_ignored_truth_does_not_count(tmp_path, make_shards, png_of):
    truth_HW = TRUTH_HW.copy()
    truth_HW[:, ::2] = 255
    index = make_shards(tmp_path / "set", 1, mask=png_of(truth_HW))
    scores = evaluate.score(samples(index), lambda _: np.where(truth_HW == 255, 3, TRUTH_HW), NAMES)
    assert scores.miou == 1.0 and np.isnan(scores.iou[3])


def test_a_set_without_masks_says_what_to_build(tmp_path, make_shards):
    index = make_shards(tmp_path / "set", 1, mask=None)
    with pytest.raises(ValueError, match="image_0: no ground-truth mask in the shard; build the shards with --masks"):
        evaluate.score(samples(index), lambda _: TRUTH_HW, NAMES)


def test_the_best_cam_threshold_is_found(tmp_path, make_shards):
    """The object stands out at 0.62 above a false 0.28 elsewhere, so any threshold in between is perfect."""
    maps_1hw = np.where(TRUTH_HW, round(0.62 * 255), round(0.28 * 255)).astype(np.uint8)[None]
    index = make_shards(tmp_path / "set", 2, cam=Cam((1,), maps_1hw, 1.0), seed=None)
    scores = evaluate.best_cam_threshold(samples(index), NAMES)
    assert scores.threshold == 0.3 and scores.miou == 1.0
    for chosen, miou in [(0.25, (0 + 0.5) / 2), (0.6, 1), (0.65, (0.5 + 0) / 2)]:
        assert scores.curve[chosen] == pytest.approx(miou)
        config_scores = evaluate.score(
            samples(index), lambda s, t=chosen: evaluate.cam_to_seed(evaluate.cam_maps(s), (1,), t), NAMES
        )
        assert config_scores.miou == pytest.approx(miou)


@pytest.mark.parametrize("seed", range(3))
def test_the_matrix_at_each_threshold_is_that_of_its_seeds(tmp_path, make_shards, png_of, seed):
    """Two maps, equal in places, with values at a threshold and beside it, wherever the truth is, and where it is ignored."""
    rng = np.random.default_rng(seed)
    truth_HW = rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), (H, W))
    cam = Cam((1, 3), rng.choice(np.array([0, 12, 13, 127, 128, 242, 243, 255], np.uint8), (2, H, W)), 1.0)
    index = make_shards(tmp_path / "set", 2, classes=(1, 3), cam=cam, seed=None, mask=png_of(truth_HW))
    unlabelled = make_shards(tmp_path / "other", 1, classes=(), cam=None, seed=None, mask=png_of(truth_HW))
    found = [*samples(index), *samples(unlabelled)]
    matrices_TKK = evaluate.threshold_confusions(found, len(NAMES))
    for threshold, matrix_KK in zip(evaluate.THRESHOLDS, matrices_TKK, strict=True):
        seeds = [evaluate.cam_to_seed(evaluate.cam_maps(s), (1, 3) if s.cam else (), threshold) for s in found]
        np.testing.assert_array_equal(matrix_KK, sum(confusion(truth_HW, seed_HW, len(NAMES)) for seed_HW in seeds))


def test_a_crf_finds_in_the_picture_what_the_cam_has_missed(tmp_path, make_shards, png_of, tiny_config):
    """The CAM is sure of the left edge alone; the object's half of the picture is bright, the rest dark."""
    cam_HW = np.where(np.arange(W) < W // 8, 255, 51).astype(np.uint8)[None].repeat(H, axis=0)
    picture = png_of(np.stack([TRUTH_HW * 200] * 3, axis=2))
    index = make_shards(tmp_path / "set", 2, image=picture, cam=Cam((1,), cam_HW[None], 1.0), seed=None)
    config = tiny_config("pseudo.crf={bilateral_sxy: 40, bilateral_srgb: 10, bilateral_compat: 10}", "pseudo.processes=0")
    scores = {what: evaluate.run(config, what, str(index.root), None, tmp_path).miou for what in ("cam", "cam_crf")}
    assert scores["cam"] < 0.5 and scores["cam_crf"] > 0.95


def test_the_score_of_cams_after_a_crf_needs_its_setting(shards, tiny_config, tmp_path):
    with pytest.raises(ConfigError, match="pseudo.crf is null: it is the setting in which --what cam_crf takes the CRF"):
        evaluate.run(tiny_config("pseudo.crf=null"), "cam_crf", str(shards.root), None, tmp_path)


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_mask_is_read_as_indices_whether_grey_or_palette(tmp_path):
    picture = Image.fromarray(TRUTH_HW * 3)
    picture.save(tmp_path / "grey.png")
    picture.putpalette([9] * 768)
    picture.save(tmp_path / "palette.png")
    for key in ("grey", "palette"):
        np.testing.assert_array_equal(mask_folder.read(tmp_path, key), TRUTH_HW * 3)


def test_a_missing_damaged_or_coloured_mask_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"here.png: missing; write it with python -m weakclip.pseudo"):
        mask_folder.read(tmp_path, "here")
    Image.fromarray(TRUTH_HW).save(tmp_path / "here.png")
    data = (tmp_path / "here.png").read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"no picture"):
        (tmp_path / "here.png").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"here.png: .*; remove it and run python -m weakclip.pseudo again"):
            mask_folder.read(tmp_path, "here")
    Image.new("RGB", (W, H)).save(tmp_path / "here.png")
    with pytest.raises(ValueError, match="here.png: a mask is an 8-bit palette or grey PNG, this is RGB"):
        mask_folder.read(tmp_path, "here")


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
