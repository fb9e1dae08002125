"""The likely classes of an image of any size: out of memory, the image is processed in smaller parts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from weakclip.config import InferenceConfig
from weakclip.data.sample import DecodedSample
from weakclip.masks import sliding_window
from weakclip.masks.finishing import Likely
from weakclip.masks.mask_folder import MaskSettings
from weakclip.runtime.errors import UserError

_log = logging.getLogger(__name__)


class NotFiniteError(UserError):
    """The network's probabilities are NaN or infinite. The message names the image."""


class ImageTooLargeError(UserError):
    """An image runs out of memory even in the smallest parts. The message names it and its size."""


Rows = Callable[[], Iterator[list[Tensor]]]
"""Yields probabilities as rows of tiles, K x h x w each, every time it is called."""


def likely_classes(predictor: sliding_window.Predictor, sample: DecodedSample, settings: MaskSettings) -> Likely:
    """Return the likely classes of `sample`: among all classes, or with `restrict_to_labels` among background and its labels.

    When memory runs out, a warning is logged and the image is processed in smaller parts. Raises ImageTooLargeError if even the
    smallest parts run out of memory, and NotFiniteError.
    """
    H, W = sample.image.shape[:2]
    inference, scale = settings.inference, settings.scale
    one_window = replace(inference, window_batch=1)
    ways: dict[str, Callable[[], Rows]] = {
        "as configured": lambda: _whole(predictor, sample, inference, scale),
        "with one window at a time": lambda: _whole(_eager(predictor), sample, one_window, scale),
        "strip by strip": lambda: sliding_window.predict_in_strips(_eager(predictor), sample.image, one_window, scale),
    }
    for way, rows in ways.items():
        if way != "as configured":
            _log.warning("%s: out of memory with %d x %d pixels; trying again %s", sample.name, H, W, way)
        try:
            return _occurring(rows(), sample, inference.restrict_to_labels)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        if predictor.device.type == "cuda":
            torch.cuda.empty_cache()
    raise ImageTooLargeError(f"{sample.name}: out of memory with {H} x {W} pixels, even {way}; make the image smaller")


def _eager(predictor: sliding_window.Predictor) -> sliding_window.Predictor:
    return predictor._replace(compiled=False)  # compiling for another batch takes minutes, and memory


def _whole(predictor: sliding_window.Predictor, sample: DecodedSample, inference: InferenceConfig, scale: list[int]) -> Rows:
    tiles = sliding_window.predict_tiles(predictor, sample.image, inference, scale)
    return lambda: iter(tiles)


def _occurring(rows: Rows, sample: DecodedSample, restrict_to_labels: bool) -> Likely:
    """Return the likely classes. This takes two passes over the tiles, because a class that wins in any tile is needed in all."""
    allowed = np.array([0, *sample.classes]) if restrict_to_labels else None
    found = [_winners(probs_Khw, allowed, sample.name) for row in rows() for probs_Khw in row]
    classes_n = np.unique(np.concatenate(found))
    wanted_n, top = torch.from_numpy(classes_n), 0
    probs_nHW = np.empty((len(classes_n), *sample.image.shape[:2]), np.float32)
    for row in rows():
        strip_nhW = torch.cat([probs_Khw[wanted_n] for probs_Khw in row], dim=2)
        probs_nHW[:, top : top + strip_nhW.shape[1]] = strip_nhW.cpu().numpy()
        top += strip_nhW.shape[1]
    return Likely(classes_n, probs_nHW)


def _winners(probs_Khw: Tensor, allowed: np.ndarray | None, key: str) -> np.ndarray:
    """Return the classes, int64, that are the most likely of `allowed` (None: of all) at one pixel or more."""
    highest_K = probs_Khw.amax((1, 2)).cpu()
    if not highest_K.isfinite().all():
        raise NotFiniteError(f"{key}: the network's probabilities are not finite numbers")
    if allowed is None:  # probabilities sum to one, so a class below 1/K everywhere wins nowhere
        allowed = (highest_K > 0.9 / len(highest_K)).nonzero()[:, 0].numpy()
    winners_hw = probs_Khw[torch.from_numpy(allowed)].max(0).indices  # as argmax, in a quarter of its time on a CPU
    return allowed[winners_hw.unique().cpu().numpy()]


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether the device, Python or torch on the CPU, whose error is a plain RuntimeError, ran out of memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
