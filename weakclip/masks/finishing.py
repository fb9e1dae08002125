"""Finishing a mask in a worker process: likely classes -> dense CRF -> files and statistics.

Nothing here imports torch, so a worker starts in half a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from weakclip.config import CrfConfig
from weakclip.data.sample import DecodedSample
from weakclip.masks import crf, mask_folder
from weakclip.masks.mask_folder import MaskSettings
from weakclip.masks.quality import Quality, measure
from weakclip.masks.seeds import seed_mask


class Likely(NamedTuple):
    """The classes that win at least one pixel of an image, n of them, and their probabilities."""

    classes_n: np.ndarray
    """int64, ascending."""
    probs_nHW: np.ndarray
    """float32. They sum to less than one where classes that win no pixel, or that the labels exclude, have a share."""


class Unfinished(NamedTuple):
    """An image after the network's forward pass: what a worker needs to run the CRF and write the files."""

    sample: DecodedSample
    found: Likely
    num_classes: int
    settings: MaskSettings
    folder: Path


def mask_of(found: Likely, image_HW3: np.ndarray, config: CrfConfig | None) -> np.ndarray:
    """Return the mask, uint8 H x W of class indices, after a dense CRF unless `config` is None. image_HW3: uint8 RGB."""
    if config is None:
        return found.classes_n[found.probs_nHW.argmax(0)].astype(np.uint8)
    return found.classes_n[crf.refine(found.probs_nHW, image_HW3, config)].astype(np.uint8)


def finish(work: Unfinished) -> Quality:
    """Write the files of one image. The mask comes last: if it exists, the image is done. Raises OSError naming the file."""
    sample, inference = work.sample, work.settings.inference
    mask_HW = mask_of(work.found, sample.image, inference.crf)
    if inference.soft:
        mask_folder.save_soft(work.found.classes_n, work.found.probs_nHW, mask_folder.soft_path(work.folder, sample.name))
    mask_folder.save(mask_HW, mask_folder.mask_path(work.folder, sample.name))
    seed_HW = None if sample.seed is None and sample.cam is None else seed_mask(sample, work.settings.seeds)
    return measure(mask_HW, work.found.probs_nHW, seed_HW, work.num_classes, sample.classes)
