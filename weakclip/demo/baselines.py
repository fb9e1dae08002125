"""What CAMs come to without WeakCLIP: at their best threshold, and after a dense CRF in the setting that suits them best.

Threshold and setting are chosen with the exact masks: WeakCLIP, which is not, has to beat them even so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from tqdm import tqdm

from weakclip import crf
from weakclip.behind import Behind
from weakclip.config import CrfConfig
from weakclip.data.shard import DecodedSample, Index
from weakclip.data.stream import cam_maps
from weakclip.evaluate import best_cam_threshold, count
from weakclip.metrics import Counts
from weakclip.seeds import cam_to_probabilities

COLOUR_TOLERANCES = (3.0, 5.0, 8.0, 13.0)
"""Of the bilateral kernel, in grey values: how different pixels may be that belong together. Published: 5 for VOC, 3 for COCO."""


@dataclass(frozen=True)
class Baselines:
    """mIoU in percent of the CAMs alone, and with a CRF; and what they were found with."""

    cam: float
    cam_crf: float
    threshold: float
    settings: CrfConfig

    @classmethod
    def of(cls, samples: Iterable[DecodedSample], index: Index, published: CrfConfig, processes: int | None) -> Baselines:
        """Of labelled samples with CAMs and exact masks. processes: for the CRF; None: one a core."""
        scores = best_cam_threshold(samples, index.classes)
        tried = [replace(published, bilateral_srgb=tolerance) for tolerance in COLOUR_TOLERANCES]
        found = [Counts.zero(len(index.classes)) for _ in tried]
        with Behind(processes) as pool:
            counts = pool.map(partial(_counts, threshold=scores.threshold, tried=tried, num_classes=len(index.classes)), samples)
            for made in tqdm(counts, "CAM + CRF", len(index.entries), unit=" images", disable=None):
                found = [total + own for total, own in zip(found, made, strict=True)]
        mious = [100 * each.scores(index.classes).miou for each in found]
        best = int(np.argmax(mious))
        return cls(100 * scores.miou, mious[best], scores.threshold, tried[best])

    def refined(self, sample: DecodedSample) -> np.ndarray:
        """CAM + CRF: a mask, uint8 H x W."""
        return refine(sample, self.threshold, [self.settings])[0]


def refine(sample: DecodedSample, threshold: float, settings: Sequence[CrfConfig]) -> list[np.ndarray]:
    """The CAM's mask in each setting of the CRF, uint8 H x W."""
    classes = np.array([0, *(sample.cam.classes if sample.cam else ())], np.uint8)
    probs_nHW = cam_to_probabilities(cam_maps(sample), threshold)
    return [classes[crf.refine(probs_nHW, sample.image, each)] for each in settings]


def _counts(sample: DecodedSample, threshold: float, tried: Sequence[CrfConfig], num_classes: int) -> list[Counts]:
    """Of each setting, on one image."""
    return [count([sample], lambda _, made=made: made, num_classes) for made in refine(sample, threshold, tried)]  # type: ignore[misc]
