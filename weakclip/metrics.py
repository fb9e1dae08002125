"""Confusion matrix -> IoU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weakclip.labels import IGNORE


def confusion(truth_HW: np.ndarray, prediction_HW: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts, int64 K x K: row = true class, column = predicted class. Pixels whose truth is 255 do not count.

    Raises ValueError when the sizes differ or a prediction lies outside 0..K-1.
    """
    if truth_HW.shape != prediction_HW.shape:
        raise ValueError(f"prediction is {prediction_HW.shape}, truth is {truth_HW.shape}")
    valid_HW = truth_HW != IGNORE
    truth, prediction = truth_HW[valid_HW].astype(np.int64), prediction_HW[valid_HW].astype(np.int64)
    for name, values in (("truth", truth), ("prediction", prediction)):
        if values.size and values.max() >= num_classes:
            raise ValueError(f"{name} holds class {values.max()}, but there are {num_classes} classes")
    return np.bincount(truth * num_classes + prediction, minlength=num_classes**2).reshape(num_classes, num_classes)


@dataclass(frozen=True)
class Scores:
    """IoU per class (NaN where a class is neither in the truth nor predicted) and their mean over the others, as fractions."""

    names: tuple[str, ...]
    iou: tuple[float, ...]
    miou: float

    @classmethod
    def of(cls, matrix_KK: np.ndarray, names: Sequence[str]) -> Scores:
        hit_K = np.diag(matrix_KK).astype(float)
        union_K = matrix_KK.sum(0) + matrix_KK.sum(1) - hit_K
        iou_K = np.divide(hit_K, union_K, out=np.full(len(names), np.nan), where=union_K > 0)
        miou = float(np.nanmean(iou_K)) if (union_K > 0).any() else float("nan")
        return cls(tuple(names), tuple(iou_K.tolist()), miou)

    def as_dict(self) -> dict[str, object]:
        """For JSON: percentages, null for classes that do not occur."""
        percent = [None if np.isnan(value) else round(100 * value, 2) for value in (self.miou, *self.iou)]
        return {"miou": percent[0], "iou": dict(zip(self.names, percent[1:], strict=True))}

    def table(self) -> str:
        width = max(map(len, self.names))
        rows = [f"{name:<{width}}  {100 * value:6.2f}" for name, value in zip(self.names, self.iou, strict=True)]
        return "\n".join([*rows, f"{'mIoU':<{width}}  {100 * self.miou:6.2f}"]).replace("   nan", "     -")
