"""IoU, precision and recall against values by hand and torchmetrics."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weakclip.evaluation.metrics import Counts, Scores, confusion
from weakclip.runtime.torchvision_ops import declare_missing

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


def test_precision_and_recall_are_of_predicted_and_true_pixels_and_their_means_of_the_classes_that_have_one():
    scores = Scores.of(np.array([[6, 2, 0], [0, 3, 1], [0, 0, 0]]), NAMES)
    assert scores.precision == (1.0, 3 / 5, 0.0)
    assert scores.recall[:2] == (6 / 8, 3 / 4) and math.isnan(scores.recall[2])  # never true
    means = scores.as_dict()
    assert means["mean_precision"] == 53.33 and means["mean_recall"] == 75.0
    never_predicted = Scores.of(np.array([[6, 2, 0], [0, 3, 0], [1, 0, 0]]), NAMES)
    assert math.isnan(never_predicted.precision[2]) and never_predicted.recall[2] == 0


def test_boundary_iou_is_of_its_own_counts():
    scores = Scores.of(np.diag([5, 5, 0]), NAMES, np.array([[2, 3], [1, 4], [0, 0]]))
    assert scores.iou[:2] == (1, 1) and scores.boundary_iou[:2] == (2 / 3, 1 / 4) and math.isnan(scores.boundary_iou[2])
    found = scores.as_dict()
    assert found["boundary_iou"] == {"background": 66.67, "cat": 25.0, "dog": None} and found["mean_boundary_iou"] == 45.83


@pytest.fixture(scope="module")
def classification():
    declare_missing()  # torchmetrics imports torchvision
    from torchmetrics.functional import classification

    return classification


def predictions(classes: int):
    """Truth and prediction of a few of the 81 classes; a class may be in both, in one or in none."""
    some = st.lists(st.integers(0, classes - 1), min_size=1, max_size=6)
    return st.tuples(some, some, st.integers(0, 99))


def drawn(truths: list[int], predicted: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.choice(np.array([*truths, 255], np.uint8), (9, 11)), random.choice(np.array(predicted, np.uint8), (9, 11))


@given(predictions(81))
@settings(deadline=None, max_examples=50)
def test_torchmetrics_gives_the_same_for_81_classes(classification, case):
    truth_HW, prediction_HW = drawn(*case)
    scores = Scores.of(confusion(truth_HW, prediction_HW, 81), [str(index) for index in range(81)])
    pair = torch.from_numpy(prediction_HW).long(), torch.from_numpy(truth_HW).long()
    common = {"num_classes": 81, "ignore_index": 255, "validate_args": False}
    for ours, theirs in (
        (scores.iou, classification.multiclass_jaccard_index),
        (scores.precision, classification.multiclass_precision),
        (scores.recall, classification.multiclass_recall),
    ):
        # torchmetrics gives 0 where there is no value, and includes it in its mean of precisions and recalls.
        np.testing.assert_allclose(np.nan_to_num(ours), theirs(*pair, **common, average="none").numpy(), atol=1e-6)
    true, predicted = (set(values[truth_HW != 255].tolist()) for values in (truth_HW, prediction_HW))
    for values, defined in ((scores.iou, true | predicted), (scores.precision, predicted), (scores.recall, true)):
        assert {index for index, value in enumerate(values) if not math.isnan(value)} == defined
    if true:
        assert scores.miou == pytest.approx(float(np.mean([scores.iou[index] for index in true | predicted])))
        assert scores.miou == pytest.approx(float(classification.multiclass_jaccard_index(*pair, **common)), abs=1e-6)


def test_counts_add_up():
    one, two = Counts(np.eye(3, dtype=int), np.ones((3, 2), int)), Counts(np.ones((3, 3), int), np.full((3, 2), 4))
    both = sum([one, two], start=Counts.zero(3))
    assert both.matrix_KK.tolist() == (np.eye(3) + 1).tolist() and both.boundary_K2.tolist() == [[5, 5]] * 3


def test_json_has_percentages_and_null_for_absent_classes():
    scores = Scores.of(confusion(TRUTH_HW, PREDICTION_HW, 3), NAMES).as_dict()
    assert json.loads(json.dumps(scores, allow_nan=False)) == {
        "miou": 41.67,
        "mean_precision": 58.33,
        "mean_recall": 58.33,
        "iou": {"background": 33.33, "cat": 50.0, "dog": None},
        "precision": {"background": 50.0, "cat": 66.67, "dog": None},
        "recall": {"background": 50.0, "cat": 66.67, "dog": None},
    }


def test_without_any_pixel_every_score_is_null():
    nothing_HW = np.full((2, 2), 255, np.uint8)
    scores = Scores.of(confusion(nothing_HW, PREDICTION_HW[:, :2], 3), NAMES)
    nothing = dict.fromkeys(NAMES)
    assert scores.as_dict() == {
        **dict.fromkeys(("miou", "mean_precision", "mean_recall")),
        **dict.fromkeys(("iou", "precision", "recall"), nothing),
    }


def test_the_table_has_a_row_a_class_and_a_dash_for_absent_ones():
    matrix_KK = confusion(TRUTH_HW, PREDICTION_HW, 3)
    rows = str(Scores.of(matrix_KK, NAMES).table()).splitlines()
    assert [row.split() for row in rows] == [
        ["IoU", "precision", "recall"],
        ["background", "33.33", "50.00", "50.00"],
        ["cat", "50.00", "66.67", "66.67"],
        ["dog", "-", "-", "-"],
        ["mean", "41.67", "58.33", "58.33"],
    ]
    assert len({len(row) for row in rows}) == 1
    with_boundary = str(Scores.of(matrix_KK, NAMES, np.array([[1, 5], [0, 4], [0, 0]])).table()).splitlines()
    assert [row.split()[-1] for row in with_boundary] == ["IoU", "20.00", "0.00", "-", "10.00"]
    assert with_boundary[0].endswith("boundary IoU") and len({len(row) for row in with_boundary}) == 1


def test_another_size_or_class_is_refused():
    with pytest.raises(ValueError, match=r"shape mismatch: the prediction is \(3, 2\), the truth \(2, 3\)"):
        confusion(TRUTH_HW, PREDICTION_HW.T, 3)
    with pytest.raises(ValueError, match="prediction holds class 255, but there are 3"):
        confusion(TRUTH_HW, np.full((2, 3), 255, np.uint8), 3)
    with pytest.raises(ValueError, match="truth holds class 1, but there are 1"):
        confusion(TRUTH_HW, np.zeros((2, 3), np.uint8), 1)


def test_255_predicted_where_the_truth_is_ignored_is_no_error():
    assert confusion(TRUTH_HW, np.where(TRUTH_HW == 255, 255, 0), 3).tolist() == [[2, 0, 0], [3, 0, 0], [0, 0, 0]]
