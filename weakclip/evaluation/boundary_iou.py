"""Boundary IoU: the IoU of the contours of masks.

Cheng et al., CVPR 2021, "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation"; the width of the boundary and
the image's border are those of its released code.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from weakclip.labels import IGNORE

WIDTH = 0.02
"""Width of a boundary, as a fraction of the image's diagonal."""


def boundary_counts(truth_HW: np.ndarray, prediction_HW: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the pixels in the intersection and the union of the true and predicted boundary of each class, int64 K x 2.

    The boundary of a class consists of its pixels within d = max(1, round(2 % of the image's diagonal)) pixels, in x and in y, of
    a pixel that does not belong to it; no pixel outside the image does. Pixels whose truth is 255 belong to no class, in the
    prediction too, so the counts do not depend on what is predicted there. The prediction has the truth's size and holds 0..K-1
    elsewhere.
    """
    truth_HW = truth_HW.astype(np.uint8)
    prediction_HW = np.where(truth_HW == IGNORE, IGNORE, prediction_HW).astype(np.uint8)
    true_HW, predicted_HW = _boundaries(truth_HW), _boundaries(prediction_HW)
    both_HW = true_HW & predicted_HW & (truth_HW == prediction_HW)
    found = ((truth_HW, both_HW), (truth_HW, true_HW), (prediction_HW, predicted_HW))
    hit_K, true_K, predicted_K = (np.bincount(labels_HW[region_HW], minlength=num_classes) for labels_HW, region_HW in found)
    return np.stack([hit_K, true_K + predicted_K - hit_K], axis=1)


def _boundaries(labels_HW: np.ndarray) -> np.ndarray:
    """Return the boundaries of all classes at once, bool H x W.

    d erosions of a class by a 3 x 3 square leave the pixels whose surrounding square of side 2 d + 1 holds only that class. These
    are the pixels where the smallest and the largest label in the square are equal.
    """
    d = max(1, round(WIDTH * math.hypot(*labels_HW.shape)))
    square = np.ones((2 * d + 1, 2 * d + 1), np.uint8)
    padded_HW = np.pad(labels_HW, 1, constant_values=IGNORE)
    varied_HW = cv2.erode(padded_HW, square) != cv2.dilate(padded_HW, square)
    return varied_HW[1:-1, 1:-1] & (labels_HW != IGNORE)
