"""Scoring predictions, seeds and CAMs against the ground-truth masks of samples."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from tqdm import tqdm

from weakclip import labels
from weakclip.config import CrfConfig, SeedConfig
from weakclip.data.index import ShardError
from weakclip.data.sample import DecodedSample
from weakclip.evaluation.boundary_iou import boundary_counts
from weakclip.evaluation.metrics import Counts, Scores, confusion, percent
from weakclip.masks.seeds import cam_maps, cam_to_seed, refined_cam, seed_mask, strongest
from weakclip.runtime.workers import WorkerPool

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))


@dataclass(frozen=True)
class CamScores(Scores):
    """Scores of CAMs at the background threshold with the highest mIoU."""

    threshold: float
    curve: Mapping[float, float]
    """The mIoU at each of THRESHOLDS, as a fraction."""

    def as_dict(self) -> dict[str, object]:
        curve = {f"{threshold:.2f}": percent(miou) for threshold, miou in self.curve.items()}
        return {**super().as_dict(), "threshold": self.threshold, "thresholds": curve}

    def curve_text(self) -> str:
        """Return the curve as a few lines of text, with the best threshold marked."""
        points = (f"{at:.2f}:{100 * miou:.2f}{'*' if at == self.threshold else ''}" for at, miou in self.curve.items())
        return textwrap.fill("  ".join(points), width=100)


def score(samples: Iterable[DecodedSample], predict: Callable[[DecodedSample], np.ndarray], names: Sequence[str]) -> Scores:
    """Return the scores of `predict(sample)` against each sample's mask. Predicted 255 (ignored by a seed) is background."""
    return count(tqdm(samples, "scoring", unit=" images", disable=None), predict, len(names)).scores(names)


def count(samples: Iterable[DecodedSample], predict: Callable[[DecodedSample], np.ndarray], num_classes: int) -> Counts:
    """Return the counts behind `score`. The counts of several parts add up to those of the whole."""
    total = Counts.zero(num_classes)
    for sample in samples:
        prediction_HW = predict(sample)
        total += _sample_counts(sample, np.where(prediction_HW == labels.IGNORE, 0, prediction_HW), num_classes)
    return total


def _sample_counts(sample: DecodedSample, prediction_HW: np.ndarray, num_classes: int) -> Counts:
    found = truth(sample), prediction_HW, num_classes
    return Counts(confusion(*found), boundary_counts(*found))


def truth(sample: DecodedSample) -> np.ndarray:
    if sample.mask is None:
        raise ShardError(f"{sample.name}: no ground-truth mask in the shard; build the shards with --masks")
    return sample.mask


def best_cam_threshold(samples: Iterable[DecodedSample], names: Sequence[str]) -> CamScores:
    """Return the CAMs' scores at the single background threshold with the highest mIoU. Iterates over `samples` twice."""
    matrices_TKK = threshold_confusions(tqdm(samples, "CAM thresholds", unit=" images", disable=None), len(names))
    curve = {at: Scores.of(matrix_KK, names).miou for at, matrix_KK in zip(THRESHOLDS, matrices_TKK, strict=True)}
    best = max(curve, key=curve.__getitem__)
    found = score(samples, lambda sample: cam_to_seed(cam_maps(sample), sample.cam.classes if sample.cam else (), best), names)
    return CamScores(**vars(found), threshold=best, curve=curve)


def threshold_confusions(samples: Iterable[DecodedSample], num_classes: int) -> np.ndarray:
    """Return the confusion matrices of the CAMs at each of THRESHOLDS, int64 T x K x K, in one pass over the pixels.

    A pixel is counted by its true class, the class of its strongest map, and the number of thresholds that this map reaches. At
    those thresholds it is predicted as the map's class, at the others as background.
    """
    K, T = num_classes, len(THRESHOLDS)
    thresholds_T = np.array(THRESHOLDS, np.float32)
    reached_TKK = np.zeros((T + 1, K, K), np.int64)
    for sample in samples:
        class_HW, value_HW = strongest(cam_maps(sample), sample.cam.classes if sample.cam else ())
        true_HW = truth(sample)
        valid_HW = true_HW != labels.IGNORE
        reached = thresholds_T.searchsorted(value_HW[valid_HW], side="right")
        pixels = (reached * K + true_HW[valid_HW]) * K + class_HW[valid_HW]
        reached_TKK += np.bincount(pixels, minlength=reached_TKK.size).reshape(reached_TKK.shape)
    kept_TKK = reached_TKK[:0:-1].cumsum(0)[::-1]  # pixels that reach each threshold or a higher one
    matrices_TKK = kept_TKK.copy()
    matrices_TKK[:, :, 0] += (reached_TKK.sum(0) - kept_TKK).sum(2)
    return matrices_TKK


def cam_crf_counts(
    samples: Iterable[DecodedSample], threshold: float, settings: Sequence[CrfConfig], num_classes: int, processes: int | None
) -> list[Counts]:
    """Return the counts of the CAMs at a threshold after a dense CRF, for each setting. processes: as `pseudo.processes`."""
    total = [Counts.zero(num_classes)] * len(settings)
    with WorkerPool(processes) as pool:
        found = pool.map(partial(_cam_crf_counts, threshold=threshold, settings=settings, num_classes=num_classes), samples)
        for counts in tqdm(found, "CAM + CRF", unit=" images", disable=None):
            total = [whole + part for whole, part in zip(total, counts, strict=True)]
    return total


def _cam_crf_counts(sample: DecodedSample, threshold: float, settings: Sequence[CrfConfig], num_classes: int) -> list[Counts]:
    """Return the counts of one image for each setting of the CRF."""
    maps_nHW, classes = cam_maps(sample), sample.cam.classes if sample.cam else ()
    return [_sample_counts(sample, refined_cam(maps_nHW, classes, sample.image, threshold, crf), num_classes) for crf in settings]


def seed_scores(samples: Iterable[DecodedSample], seeds: SeedConfig, names: Sequence[str], processes: int | None) -> Scores:
    """Return the scores of the seed masks that training uses. processes: for `seeds.crf`, if set; None: one per core."""
    total = Counts.zero(len(names))
    with WorkerPool(processes if seeds.crf else 0) as workers:
        found = workers.map(partial(_seed_counts, seeds=seeds, num_classes=len(names)), samples)
        for counts in tqdm(found, "scoring", unit=" images", disable=None):
            total += counts
    return total.scores(names)


def _seed_counts(sample: DecodedSample, seeds: SeedConfig, num_classes: int) -> Counts:
    """Return the counts of one image's seed mask."""
    return count([sample], lambda sample: seed_mask(sample, seeds), num_classes)
