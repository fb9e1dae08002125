"""Counting predictions and CAMs against the truth, on a set whose left half is class 1 (cat)."""

from __future__ import annotations

import numpy as np
import pytest

from weakclip.data.index import Index
from weakclip.data.sample import Cam
from weakclip.data.stream import StoredSamples
from weakclip.evaluation import scoring
from weakclip.evaluation.metrics import confusion
from weakclip.masks.seeds import cam_maps, cam_to_seed

NAMES = ("background", "cat", "dog", "cow")
H, W = 48, 64
TRUTH_HW = np.repeat((np.arange(W) < W // 2).astype(np.uint8)[None], H, axis=0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_shards) -> Index:
    return make_shards(tmp_path_factory.mktemp("scoring") / "set", 4, 2)


def samples(index: Index):
    return StoredSamples(index, index.entries, 0)


def test_the_truth_scores_100_and_absent_classes_are_null(shards):
    scores = scoring.score(samples(shards), lambda sample: sample.mask, NAMES).as_dict()
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
    found = scoring.score(samples(shards), lambda sample: sample.mask * (sample.name != "image_2"), NAMES)
    half, whole = 48 * 32 - 44 * 28, 48 * 64 - 44 * 60
    both = 4 * 32 + 2 * 44  # the three sides of the half on the image's border
    assert found.boundary_iou[:2] == ((3 * half + both) / (3 * half + half + whole - both), 3 / 4)


def test_a_prediction_is_scored_over_all_samples_together(shards):
    """Three of four images right, one all background: cat 3 / 4, background 4 / 5 (of half images)."""
    scores = scoring.score(samples(shards), lambda s: s.mask * (s.name != "image_2"), NAMES)
    assert scores.iou[:2] == pytest.approx((4 / 5, 3 / 4)) and scores.miou == pytest.approx((0.8 + 0.75) / 2)


def test_ignored_predictions_count_as_background(shards):
    """A quarter of the width is ignored in each half: cat is half found; background has a false quarter."""
    prediction_HW = TRUTH_HW.copy()
    prediction_HW[:, W // 4 : 3 * W // 4] = 255
    scores = scoring.score(samples(shards), lambda _: prediction_HW, NAMES)
    assert scores.iou[:2] == pytest.approx((2 / 3, 1 / 2))


def test_ignored_truth_does_not_count(tmp_path, make_shards, png_of):
    truth_HW = TRUTH_HW.copy()
    truth_HW[:, ::2] = 255
    index = make_shards(tmp_path / "set", 1, mask=png_of(truth_HW))
    scores = scoring.score(samples(index), lambda _: np.where(truth_HW == 255, 3, TRUTH_HW), NAMES)
    assert scores.miou == 1.0 and np.isnan(scores.iou[3])


def test_a_set_without_masks_says_what_to_build(tmp_path, make_shards):
    index = make_shards(tmp_path / "set", 1, mask=None)
    with pytest.raises(ValueError, match="image_0: no ground-truth mask in the shard; build the shards with --masks"):
        scoring.score(samples(index), lambda _: TRUTH_HW, NAMES)


def test_the_best_cam_threshold_is_found(tmp_path, make_shards):
    """The object stands out at 0.62 above a false 0.28 elsewhere, so any threshold in between is perfect."""
    maps_1hw = np.where(TRUTH_HW, round(0.62 * 255), round(0.28 * 255)).astype(np.uint8)[None]
    index = make_shards(tmp_path / "set", 2, cam=Cam((1,), maps_1hw, 1.0), seed=None)
    scores = scoring.best_cam_threshold(samples(index), NAMES)
    assert scores.threshold == 0.3 and scores.miou == 1.0
    for chosen, miou in [(0.25, (0 + 0.5) / 2), (0.6, 1), (0.65, (0.5 + 0) / 2)]:
        assert scores.curve[chosen] == pytest.approx(miou)
        config_scores = scoring.score(samples(index), lambda s, t=chosen: cam_to_seed(cam_maps(s), (1,), t), NAMES)
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
    matrices_TKK = scoring.threshold_confusions(found, len(NAMES))
    for threshold, matrix_KK in zip(scoring.THRESHOLDS, matrices_TKK, strict=True):
        seeds = [cam_to_seed(cam_maps(s), (1, 3) if s.cam else (), threshold) for s in found]
        np.testing.assert_array_equal(matrix_KK, sum(confusion(truth_HW, seed_HW, len(NAMES)) for seed_HW in seeds))
