"""Seed masks from activation maps."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from weakclip.config import CrfConfig, SeedConfig
from weakclip.data.index import ShardError
from weakclip.data.sample import Cam
from weakclip.masks.seeds import cam_to_probabilities, cam_to_seed, refined_seed, seed_mask

MAPS_2HW = np.array([[[0.1, 0.5, 0.9, 0.3]], [[0.2, 0.6, 0.1, 0.3]]], np.float32)


def test_a_seed_takes_the_strongest_class_is_ignored_in_between_and_background_below():
    assert cam_to_seed(MAPS_2HW, (4, 7), 0.3, 0.7).tolist() == [[0, 255, 4, 255]]
    assert cam_to_seed(MAPS_2HW, (4, 7), 0.3).tolist() == [[0, 7, 4, 4]]  # a threshold passes itself; the first class wins a tie


def test_a_refined_seed_is_what_the_crf_decides_at_both_thresholds():
    image_HW3 = np.full((8, 40, 3), 128, np.uint8)
    map_HW = np.repeat([0.9, 0.9, 0.5, 0.5, 0.1], 8)[None].repeat(8, 0).astype(np.float32)
    map_HW[4, 4] = 0.1  # a speck, which the CRF removes
    seed_HW = refined_seed(map_HW[None], (4,), image_HW3, 0.3, 0.7, CrfConfig(bilateral_compat=0))
    assert cam_to_seed(map_HW[None], (4,), 0.3, 0.7)[4, 4] == 0
    assert np.unique(seed_HW[:, :14]).tolist() == [4] and np.unique(seed_HW[:, 34:]).tolist() == [0]
    assert np.unique(seed_HW[:, 18:30]).tolist() == [255]


def test_without_classes_all_is_background():
    for thresholds in ((0.3,), (0.0, 0.5)):
        seed_HW = cam_to_seed(np.zeros((0, 2, 3), np.float32), (), *thresholds)
        assert seed_HW.shape == (2, 3) and seed_HW.dtype == np.uint8 and not seed_HW.any()
    refined_HW = refined_seed(np.zeros((0, 2, 3), np.float32), (), np.zeros((2, 3, 3), np.uint8), 0.3, 0.3, CrfConfig())
    assert refined_HW.shape == (2, 3) and refined_HW.dtype == np.uint8 and not refined_HW.any()


def test_probabilities_of_activation_maps_sum_to_one_with_the_background_first():
    probs_3HW = cam_to_probabilities(MAPS_2HW, 0.4)
    np.testing.assert_allclose(probs_3HW.sum(0), 1, rtol=1e-6)
    np.testing.assert_allclose(probs_3HW[:, 0, 1], np.array([0.4, 0.5, 0.6]) / 1.5, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------- the one rule


def sample_of(image_HW3: np.ndarray, classes=(4,), **changes) -> SimpleNamespace:
    return SimpleNamespace(**{"name": "made up", "image": image_HW3, "size": image_HW3.shape[:2], "classes": classes} | changes)


def test_the_seed_of_a_sample_is_its_own_or_else_its_cams_with_the_crf_that_is_set():
    image_HW3 = np.full((8, 40, 3), 128, np.uint8)
    map_HW = np.repeat(np.array([230, 230, 128, 128, 25], np.uint8), 8)[None].repeat(8, 0)
    map_HW[4, 4] = 25  # a speck, which the CRF removes
    cam, own_HW = Cam((4,), map_HW[None], 1.0), np.full((8, 40), 4, np.uint8)
    maps_nHW = map_HW[None].astype(np.float32) / 255
    crf = CrfConfig(bilateral_compat=0)
    plain, refined = SeedConfig(0.3, 0.7), SeedConfig(0.3, 0.7, crf)
    from_cam = sample_of(image_HW3, cam=cam, seed=None)
    thresholds_HW = cam_to_seed(maps_nHW, (4,), 0.3, 0.7)
    crf_HW = refined_seed(maps_nHW, (4,), image_HW3, 0.3, 0.7, crf)
    assert thresholds_HW[4, 4] == 0 and crf_HW[4, 4] == 4
    np.testing.assert_array_equal(seed_mask(from_cam, plain), thresholds_HW)
    np.testing.assert_array_equal(seed_mask(from_cam, refined), crf_HW)
    for config in (plain, refined):
        assert seed_mask(sample_of(image_HW3, cam=cam, seed=own_HW), config) is own_HW


@pytest.mark.parametrize("crf", [None, CrfConfig()])
def test_without_a_cam_only_an_unlabelled_sample_has_a_seed_which_is_background(crf):
    image_HW3 = np.zeros((2, 3, 3), np.uint8)
    seed_HW = seed_mask(sample_of(image_HW3, (), cam=None, seed=None), SeedConfig(crf=crf))
    assert seed_HW.shape == (2, 3) and seed_HW.dtype == np.uint8 and not seed_HW.any()
    with pytest.raises(ShardError, match="made up: neither CAM nor seed; build the shards with --cams"):
        seed_mask(sample_of(image_HW3, (4,), cam=None, seed=None), SeedConfig(crf=crf))
