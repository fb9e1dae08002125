"""An image's likely classes: those that win at least one pixel, and their probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from weakclip.config import Config
from weakclip.data.sample import DecodedSample
from weakclip.masks import sliding_window


class NotFinite(ValueError):
    """The network's probabilities are NaN or infinite; the message names the image."""


class Likely(NamedTuple):
    classes_n: np.ndarray
    """int64, ascending."""
    probs_nHW: np.ndarray
    """float32; what is missing to one belongs to classes that win no pixel, or that the labels exclude."""


Rows = Callable[[], Iterator[list[Tensor]]]
"""Gives probabilities as rows of tiles, K x h x w each, as often as it is called."""


def likely(predictor: sliding_window.Predictor, sample: DecodedSample, config: Config, say: Callable[[str], object]) -> Likely:
    """The likely classes of `sample`: of all, or with `pseudo.restrict_to_labels` of background and its labels.

    An image too large for memory is tried in smaller parts, which `say` is told. Raises ValueError naming it where none are small
    enough, and NotFinite.
    """
    H, W = sample.image.shape[:2]
    ways: dict[str, Callable[[], Rows]] = {
        "as configured": lambda: _whole(predictor, sample, config),
        "with one window at a time": lambda: _whole(predictor, sample, _one_window(config)),
        "strip by strip": lambda: sliding_window.predict_in_strips(
            predictor, sample.image, _one_window(config).pseudo, config.data.scale
        ),
    }
    for way, rows in ways.items():
        if way != "as configured":
            say(f"{sample.key}: {H} x {W} pixels do not fit into memory; trying again {way}")
        try:
            return _occurring(rows(), sample, config)
        except (MemoryError, RuntimeError) as error:
            if not _is_want_of_memory(error):
                raise
        if predictor.device.type == "cuda":
            torch.cuda.empty_cache()
    raise ValueError(f"{sample.key}: {H} x {W} pixels do not fit into memory, not even {way}; make the image smaller")


def _one_window(config: Config) -> Config:
    return replace(config, pseudo=replace(config.pseudo, window_batch=1))


def _whole(predictor: sliding_window.Predictor, sample: DecodedSample, config: Config) -> Rows:
    tiles = sliding_window.predict_tiles(predictor, sample.image, config.pseudo, config.data.scale)
    return lambda: iter(tiles)


def _occurring(rows: Rows, sample: DecodedSample, config: Config) -> Likely:
    """Two rounds, since a class that wins in any tile is wanted in all."""
    allowed = np.array([0, *sample.classes]) if config.pseudo.restrict_to_labels else None
    found = [_winners(probs_Khw, allowed, sample.key) for row in rows() for probs_Khw in row]
    classes_n = np.unique(np.concatenate(found))
    wanted_n, top = torch.from_numpy(classes_n), 0
    probs_nHW = np.empty((len(classes_n), *sample.image.shape[:2]), np.float32)
    for row in rows():
        strip_nhW = torch.cat([probs_Khw[wanted_n] for probs_Khw in row], dim=2)
        probs_nHW[:, top : top + strip_nhW.shape[1]] = strip_nhW.cpu().numpy()
        top += strip_nhW.shape[1]
    return Likely(classes_n, probs_nHW)


def _winners(probs_Khw: Tensor, allowed: np.ndarray | None, key: str) -> np.ndarray:
    """Classes, int64, that are the likeliest of `allowed` (None: of all) somewhere."""
    highest_K = probs_Khw.amax((1, 2)).cpu()
    if not highest_K.isfinite().all():
        raise NotFinite(f"{key}: the network's probabilities are not finite numbers")
    if allowed is None:  # probabilities sum to one: what stays under 1/K everywhere wins nowhere, and needs no look
        allowed = (highest_K > 0.9 / len(highest_K)).nonzero()[:, 0].numpy()
    winners_hw = probs_Khw[torch.from_numpy(allowed)].max(0).indices  # argmax's, in a quarter of its time on a CPU
    return allowed[winners_hw.unique().cpu().numpy()]


def _is_want_of_memory(error: Exception) -> bool:
    """Of the device (torch.OutOfMemoryError), of Python, or of torch on the CPU, whose error has no class of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
