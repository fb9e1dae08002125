"""IoU by hand, and seed masks from activation maps."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from weakclip.metrics import Scores, confusion
from weakclip.seeds import cam_to_probabilities, cam_to_seed

NAMES = ("background", "cat", "dog")
TRUTH_HW = np.array([[0, 0, 1], [1, 1, 255]], np.uint8)
PREDICTION_HW = np.array([[0, 1, 1], [1, 0, 2]], np.uint8)


def test_the_confusion_matrix_counts_truth_by_row_and_leaves_ignored_pixels_out():
    assert confusion(TRUTH_HW, PREDICTION_HW, 3).tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]


def test_iou_is_intersection_over_union_and_the_mean_leaves_absent_classes_out():
    scores = Scores.of(confusion(TRUTH_HW, PREDICTION_HW, 3), NAMES)
    assert scores.iou[:2] == (1 / 3, 2 / 4) and math.isnan(scores.iou[2])
    assert scores.miou == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_a_class_that_is_only_predicted_counts_as_zero():
    scores = Scores.of(np.array([[3, 0, 1], [0, 4, 0], [0, 0, 0]]), NAMES)
    assert scores.iou == (0.75, 1.0, 0.0) and scores.miou == pytest.approx(1.75 / 3)


def test_json_has_percentages_and_null_for_absent_classes():
    scores = Scores.of(confusion(TRUTH_HW, PREDICTION_HW, 3), NAMES).as_dict()
    assert json.loads(json.dumps(scores, allow_nan=False)) == {
        "miou": 41.67,
        "iou": {"background": 33.33, "cat": 50.0, "dog": None},
    }


def test_without_any_pixel_every_score_is_null():
    nothing_HW = np.full((2, 2), 255, np.uint8)
    scores = Scores.of(confusion(nothing_HW, PREDICTION_HW[:, :2], 3), NAMES)
    assert scores.as_dict() == {"miou": None, "iou": dict.fromkeys(NAMES)}


def test_the_table_has_a_row_a_class_and_a_dash_for_absent_ones():
    rows = Scores.of(confusion(TRUTH_HW, PREDICTION_HW, 3), NAMES).table().splitlines()
    assert [row.split() for row in rows] == [["background", "33.33"], ["cat", "50.00"], ["dog", "-"], ["mIoU", "41.67"]]
    assert len({len(row) for row in rows}) == 1


def test_another_size_or_class_is_refused():
    with pytest.raises(ValueError, match=r"prediction is \(3, 2\), truth is \(2, 3\)"):
        confusion(TRUTH_HW, PREDICTION_HW.T, 3)
    with pytest.raises(ValueError, match="prediction holds class 255, but there are 3"):
        confusion(TRUTH_HW, np.full((2, 3), 255, np.uint8), 3)
    with pytest.raises(ValueError, match="truth holds class 1, but there are 1"):
        confusion(TRUTH_HW, np.zeros((2, 3), np.uint8), 1)


def test_255_predicted_where_the_truth_is_ignored_is_no_error():
    assert confusion(TRUTH_HW, np.where(TRUTH_HW == 255, 255, 0), 3).tolist() == [[2, 0, 0], [3, 0, 0], [0, 0, 0]]


# -------------------------------------------------------------------------------------------------------------- seeds

MAPS_2HW = np.array([[[0.1, 0.5, 0.9, 0.3]], [[0.2, 0.6, 0.1, 0.3]]], np.float32)


def test_a_seed_takes_the_strongest_class_is_ignored_in_between_and_background_below():
    assert cam_to_seed(MAPS_2HW, (4, 7), 0.3, 0.7).tolist() == [[0, 255, 4, 255]]
    assert cam_to_seed(MAPS_2HW, (4, 7), 0.3).tolist() == [[0, 7, 4, 4]]  # a threshold that is reached is passed; first wins


def test_without_classes_all_is_background():
    seed_HW = cam_to_seed(np.zeros((0, 2, 3), np.float32), (), 0.3)
    assert seed_HW.shape == (2, 3) and seed_HW.dtype == np.uint8 and not seed_HW.any()


def test_probabilities_of_activation_maps_sum_to_one_with_the_background_first():
    probs_3HW = cam_to_probabilities(MAPS_2HW, 0.4)
    np.testing.assert_allclose(probs_3HW.sum(0), 1, rtol=1e-6)
    np.testing.assert_allclose(probs_3HW[:, 0, 1], np.array([0.4, 0.5, 0.6]) / 1.5, rtol=1e-6)
