"""Boundary IoU against the paper's definition, class by class, and by hand."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weakclip.evaluation.boundary_iou import boundary_counts


def boundary(mask_HW: np.ndarray, d: int) -> np.ndarray:
    """The definition: the mask without what d erosions leave of it, outside of the image nothing."""
    padded_HW = np.pad(mask_HW.astype(np.uint8), 1)
    return mask_HW & (cv2.erode(padded_HW, np.ones((3, 3), np.uint8), iterations=d)[1:-1, 1:-1] == 0)


def definition(truth_HW: np.ndarray, prediction_HW: np.ndarray, num_classes: int) -> list[list[int]]:
    d = max(1, round(0.02 * np.hypot(*truth_HW.shape)))
    counted_HW = truth_HW != 255
    counts = []
    for index in range(num_classes):
        true_HW, found_HW = (boundary((labels_HW == index) & counted_HW, d) for labels_HW in (truth_HW, prediction_HW))
        counts.append([int((true_HW & found_HW).sum()), int((true_HW | found_HW).sum())])
    return counts


@st.composite
def pairs(draw) -> tuple[np.ndarray, np.ndarray]:
    """Truth, with some 255, and prediction of four classes in blocks; the widths of their boundaries are 1 to 5."""
    size, block = draw(st.sampled_from([((7, 9), 2), ((40, 60), 9), ((90, 120), 25), ((200, 150), 60)]))
    random = np.random.default_rng(draw(st.integers(0, 999)))

    def blocks(labels: list[int]) -> np.ndarray:
        small_hw = random.choice(np.array(labels, np.uint8), [-(-side // block) for side in size])
        return small_hw.repeat(block, 0).repeat(block, 1)[: size[0], : size[1]]

    return blocks([0, 1, 2, 255]), blocks([0, 1, 3])


@given(pairs())
@settings(deadline=None, max_examples=60)
def test_all_classes_at_once_are_counted_as_the_paper_does_one(pair):
    assert boundary_counts(*pair, 5).tolist() == definition(*pair, 5)


@given(pairs(), st.integers(0, 3))
@settings(deadline=None, max_examples=30)
def test_what_is_predicted_where_the_truth_is_ignored_changes_nothing(pair, other):
    truth_HW, prediction_HW = pair
    changed_HW = np.where(truth_HW == 255, other, prediction_HW)
    assert boundary_counts(truth_HW, changed_HW, 4).tolist() == boundary_counts(truth_HW, prediction_HW, 4).tolist()


def test_by_hand():
    """8 x 8: the width is 1 pixel. A square of 4 x 4 moved by one pixel."""
    truth_HW, prediction_HW = np.zeros((2, 8, 8), np.uint8)
    truth_HW[2:6, 2:6] = 1
    prediction_HW[2:6, 3:7] = 1
    counts = boundary_counts(truth_HW, prediction_HW, 3)
    # Rings of 12 pixels: 3 + 3 pixels of the horizontal sides coincide, and no others of the vertical ones.
    assert counts[1].tolist() == [6, 18]
    # Background: all 48 true pixels are at the square or the border, and all but 6 of the predicted, 4 of which are truly square.
    assert counts[0].tolist() == [38, 52] and counts[2].tolist() == [0, 0]


@pytest.mark.parametrize(("height", "width", "d"), [(4, 4, 1), (48, 64, 2), (375, 500, 12)])
def test_the_width_is_two_percent_of_the_diagonal(height, width, d):
    whole_HW = np.zeros((height, width), np.uint8)
    ring = height * width - max(0, height - 2 * d) * max(0, width - 2 * d)
    assert boundary_counts(whole_HW, whole_HW, 1).tolist() == [[ring, ring]]


def test_an_inner_error_costs_less_iou_than_boundary_iou_and_equal_masks_score_all():
    truth_HW = np.zeros((100, 100), np.uint8)
    truth_HW[20:80, 20:80] = 1
    smaller_HW = np.zeros_like(truth_HW)
    smaller_HW[22:78, 22:78] = 1
    hit, union = boundary_counts(truth_HW, smaller_HW, 2)[1]
    assert hit / union < 0.4 < smaller_HW.sum() / truth_HW.sum()
    np.testing.assert_array_equal(*boundary_counts(truth_HW, truth_HW, 2).T)
