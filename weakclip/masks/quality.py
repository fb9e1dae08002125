"""Statistics of a pseudo mask that need no ground truth: agreement with the seeds, entropy, and pixels of each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from weakclip.labels import IGNORE


class Quality(NamedTuple):
    """Statistics of one mask."""

    pixels_K: np.ndarray
    """int64, number of pixels of each class."""
    seeded: int
    """Number of pixels with a seed that is not ignored."""
    agreeing: int
    """Number of seeded pixels on which mask and seed agree."""
    entropy: float
    """In nats, mean over pixels; the probability of all unlikely classes together counts as one more class."""
    labelled: bool
    """Whether the image has labels."""
    unlabelled_class: bool
    """Whether it has labels, and its mask a class other than these and the background."""


def measure(
    mask_HW: np.ndarray, probs_nHW: np.ndarray, seed_HW: np.ndarray | None, num_classes: int, classes: Sequence[int]
) -> Quality:
    """Return the statistics of one mask.

    probs_nHW: probabilities of the likely classes, float32. seed_HW: uint8, IGNORE where there is no seed; None: the image has no
    seed mask. classes: the image's labels.
    """
    rest_1HW = 1 - probs_nHW.sum(0, keepdims=True)
    probs_mHW = np.concatenate([probs_nHW, rest_1HW]).clip(1e-12, 1)
    entropy = -float((probs_mHW * np.log(probs_mHW)).sum(0).mean())
    seeded_HW = np.zeros_like(mask_HW, bool) if seed_HW is None else seed_HW != IGNORE
    agreeing = 0 if seed_HW is None else int((mask_HW[seeded_HW] == seed_HW[seeded_HW]).sum())
    pixels_K, labelled = np.bincount(mask_HW.ravel(), minlength=num_classes), bool(classes)
    unlabelled_class = labelled and not {0, *classes}.issuperset(pixels_K.nonzero()[0].tolist())
    return Quality(pixels_K, int(seeded_HW.sum()), agreeing, entropy, labelled, unlabelled_class)
