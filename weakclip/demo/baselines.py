"""Baselines without WeakCLIP: CAMs at their best threshold, and after a dense CRF with its best setting.

Threshold and setting are chosen with the exact masks, which WeakCLIP does not see; the setting with those of every fourth image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from weakclip.config import CrfConfig
from weakclip.data.index import Index
from weakclip.data.sample import DecodedSample
from weakclip.evaluation.scoring import best_cam_threshold, cam_crf_counts
from weakclip.masks.seeds import cam_maps, refined_cam

COLOUR_TOLERANCES = (3.0, 5.0, 8.0, 13.0)
"""Values of `bilateral_srgb`, the bilateral kernel's colour std in grey values. Published: 5 for VOC, 3 for COCO."""
CHOOSING = 4
"""One image in this many is used to choose the setting."""


@dataclass(frozen=True)
class Baselines:
    """mIoU in percent of the CAMs alone and with a CRF, and the threshold and setting used."""

    cam: float
    cam_crf: float
    threshold: float
    settings: CrfConfig

    @classmethod
    def of(cls, samples: Iterable[DecodedSample], index: Index, published: CrfConfig, processes: int | None) -> Baselines:
        """Compute the baselines of labelled samples with CAMs and exact masks. processes: for the CRF; None: one per core."""
        scores = best_cam_threshold(samples, index.classes)

        def mious(some: Iterable[DecodedSample], settings: Sequence[CrfConfig]) -> list[float]:
            found = cam_crf_counts(some, scores.threshold, settings, len(index.classes), processes)
            return [100 * counts.scores(index.classes).miou for counts in found]

        tried = [replace(published, bilateral_srgb=tolerance) for tolerance in COLOUR_TOLERANCES]
        best = tried[int(np.argmax(mious(islice(samples, 0, None, CHOOSING), tried)))]
        return cls(100 * scores.miou, mious(samples, [best])[0], scores.threshold, best)

    def refined(self, sample: DecodedSample) -> np.ndarray:
        """Return the mask of CAM + CRF, uint8 H x W."""
        classes = sample.cam.classes if sample.cam else ()
        return refined_cam(cam_maps(sample), classes, sample.image, self.threshold, self.settings)
