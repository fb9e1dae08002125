"""From an image's likely classes to its files: the CRF, KEY.npz, KEY.png."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from weakclip.config import Config, CrfConfig
from weakclip.data.sample import DecodedSample
from weakclip.masks import crf, mask_folder
from weakclip.masks.fallback import Likely
from weakclip.masks.seeds import seed_mask
from weakclip.masks.statistics import Quality, measure


class Unfinished(NamedTuple):
    """What a process is handed to finish an image."""

    sample: DecodedSample
    found: Likely
    num_classes: int
    config: Config
    folder: Path


def mask_of(found: Likely, image_HW3: np.ndarray, config: CrfConfig | None) -> np.ndarray:
    """uint8 H x W of class indices, after the dense CRF unless that is null."""
    if config is None:
        return found.classes_n[found.probs_nHW.argmax(0)].astype(np.uint8)
    return found.classes_n[crf.refine(found.probs_nHW, image_HW3, config)].astype(np.uint8)


def finish(work: Unfinished) -> Quality:
    """Write the files of one image. The mask comes last: where it is, the image is done. Raises OSError naming the file."""
    sample, config = work.sample, work.config
    mask_HW = mask_of(work.found, sample.image, config.pseudo.crf)
    if config.pseudo.soft:
        mask_folder.save_soft(work.found.classes_n, work.found.probs_nHW, mask_folder.soft_path(work.folder, sample.key))
    mask_folder.save(mask_HW, work.folder / f"{sample.key}.png")
    seed_HW = None if sample.seed is None and sample.cam is None else seed_mask(sample, config.seeds)
    return measure(mask_HW, work.found, seed_HW, work.num_classes)
