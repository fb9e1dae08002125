"""Confusion matrix, and IoU, precision and recall from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weakclip.labels import IGNORE
from weakclip.runtime.errors import UserError
from weakclip.runtime.tables import Table


def confusion(truth_HW: np.ndarray, prediction_HW: np.ndarray, num_classes: int) -> np.ndarray:
    """Return pixel counts, int64 K x K: row = true class, column = predicted class. Pixels whose truth is 255 do not count.

    Raises UserError when the sizes differ, or the truth or the prediction holds a class outside 0..K-1.
    """
    if truth_HW.shape != prediction_HW.shape:
        raise UserError(f"shape mismatch: the prediction is {prediction_HW.shape}, the truth {truth_HW.shape}")
    valid_HW = truth_HW != IGNORE
    truth, prediction = truth_HW[valid_HW].astype(np.int64), prediction_HW[valid_HW].astype(np.int64)
    for name, values in (("truth", truth), ("prediction", prediction)):
        if values.size and values.max() >= num_classes:
            raise UserError(f"{name} holds class {values.max()}, but there are {num_classes} classes")
    return np.bincount(truth * num_classes + prediction, minlength=num_classes**2).reshape(num_classes, num_classes)


@dataclass(frozen=True)
class Counts:
    """Integers that scores are computed from. Counts of parts add up to those of the whole, in any order and grouping."""

    matrix_KK: np.ndarray
    """int64: row = true class, column = predicted class."""
    boundary_K2: np.ndarray
    """int64: pixels in the intersection and union of boundaries."""

    @classmethod
    def zero(cls, num_classes: int) -> Counts:
        """Return the counts of no image."""
        return cls(np.zeros((num_classes, num_classes), np.int64), np.zeros((num_classes, 2), np.int64))

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.matrix_KK + other.matrix_KK, self.boundary_K2 + other.boundary_K2)

    def scores(self, names: Sequence[str]) -> Scores:
        return Scores.of(self.matrix_KK, names, self.boundary_K2)


@dataclass(frozen=True)
class Scores:
    """Scores per class, as fractions; NaN where the denominator is 0. Means are over the classes with a value.

    docs/results.md defines them.
    """

    names: tuple[str, ...]
    iou: tuple[float, ...]
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    boundary_iou: tuple[float, ...] | None
    """None where boundaries were not counted."""

    @classmethod
    def of(cls, matrix_KK: np.ndarray, names: Sequence[str], boundary_K2: np.ndarray | None = None) -> Scores:
        """Compute the scores from counts as in `Counts`."""
        hit_K, true_K, predicted_K = np.diag(matrix_KK), matrix_KK.sum(1), matrix_KK.sum(0)
        return cls(
            tuple(names),
            _ratios(hit_K, true_K + predicted_K - hit_K),
            _ratios(hit_K, predicted_K),
            _ratios(hit_K, true_K),
            None if boundary_K2 is None else _ratios(boundary_K2[:, 0], boundary_K2[:, 1]),
        )

    @property
    def miou(self) -> float:
        return _mean(self.iou)

    def as_dict(self) -> dict[str, object]:
        """Return percentages for JSON, None where there is no value."""
        means = {"miou": self.miou, "mean_precision": _mean(self.precision), "mean_recall": _mean(self.recall)}
        columns = {"iou": self.iou, "precision": self.precision, "recall": self.recall}
        if self.boundary_iou is not None:
            means["mean_boundary_iou"], columns["boundary_iou"] = _mean(self.boundary_iou), self.boundary_iou
        by_class = {key: dict(zip(self.names, map(percent, values), strict=True)) for key, values in columns.items()}
        return {**{key: percent(value) for key, value in means.items()}, **by_class}

    def table(self) -> Table:
        """Return a table of the scores in percent: one row per class, and one of the means."""
        columns = {"IoU": self.iou, "precision": self.precision, "recall": self.recall}
        if self.boundary_iou is not None:
            columns["boundary IoU"] = self.boundary_iou
        values = zip(*((*column, _mean(column)) for column in columns.values()), strict=True)
        rows = [(name, *(100 * value for value in row)) for name, row in zip((*self.names, "mean"), values, strict=True)]
        return Table("", ("", *columns), rows, digits=2)


def percent(fraction: float) -> float | None:
    """Return a percentage with two decimals for JSON, None for NaN."""
    return None if np.isnan(fraction) else round(100 * fraction, 2)


def _ratios(parts_K: np.ndarray, wholes_K: np.ndarray) -> tuple[float, ...]:
    return tuple(np.divide(parts_K, wholes_K, out=np.full(len(parts_K), np.nan), where=wholes_K > 0).tolist())


def _mean(values: Sequence[float]) -> float:
    defined = [value for value in values if not np.isnan(value)]
    return float(np.mean(defined)) if defined else float("nan")
