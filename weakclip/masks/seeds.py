"""Seed masks from class activation maps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weakclip.config import CrfConfig, SeedConfig
from weakclip.data.index import ShardError
from weakclip.data.sample import DecodedSample, OpenSample
from weakclip.data.transforms import resize_image
from weakclip.labels import IGNORE
from weakclip.masks import crf


def cam_to_seed(maps_nHW: np.ndarray, classes: Sequence[int], background: float, foreground: float | None = None) -> np.ndarray:
    """Return the seed mask, uint8 H x W, of one activation map (0..1) per present class.

    A pixel takes the class of the strongest map where that reaches `foreground` (default: `background`), is background (0)
    where no map reaches `background`, and is ignored (255) in between. Without classes, every pixel is background.
    """
    foreground = background if foreground is None else foreground
    seed_HW, strongest_HW = strongest(maps_nHW, classes)
    seed_HW[strongest_HW < foreground] = IGNORE
    seed_HW[strongest_HW < background] = 0
    return seed_HW


def strongest(maps_nHW: np.ndarray, classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the class of each pixel's strongest map (the first of equal ones), uint8 H x W, and its value, float32 H x W.

    Without classes, it returns background with a value below every threshold.
    """
    if not len(classes):
        return np.zeros(maps_nHW.shape[1:], np.uint8), np.full(maps_nHW.shape[1:], -np.inf, np.float32)
    class_HW, value_HW = np.full(maps_nHW.shape[1:], classes[0], np.uint8), maps_nHW[0]
    for index, map_HW in zip(classes[1:], maps_nHW[1:], strict=True):  # one pass per map: argmax over the first axis is slow
        np.copyto(class_HW, index, where=map_HW > value_HW, casting="unsafe")
        value_HW = np.maximum(value_HW, map_HW)
    return class_HW, value_HW


def refined_seed(
    maps_nHW: np.ndarray, classes: Sequence[int], image_HW3: np.ndarray, background: float, foreground: float, config: CrfConfig
) -> np.ndarray:
    """Return a seed mask as `cam_to_seed` does, uint8 H x W, but with a dense CRF at each threshold.

    A pixel takes the class that the CRF gives it at `foreground`, is background where the CRF says so at both thresholds, and is
    ignored elsewhere. (These are the confident areas of IRN, Ahn et al., CVPR 2019.)
    """
    if not len(classes):
        return np.zeros(maps_nHW.shape[1:], np.uint8)
    sure_HW, likely_HW = (refined_cam(maps_nHW, classes, image_HW3, threshold, config) for threshold in (foreground, background))
    return np.where((sure_HW == 0) & (likely_HW != 0), IGNORE, sure_HW).astype(np.uint8)


def refined_cam(
    maps_nHW: np.ndarray, classes: Sequence[int], image_HW3: np.ndarray, background: float, config: CrfConfig
) -> np.ndarray:
    """Return the mask, uint8 H x W, of a dense CRF on the image between activation maps and a constant `background`."""
    names = np.array([0, *classes], np.uint8)
    return names[crf.refine(cam_to_probabilities(maps_nHW, background), image_HW3, config)]


def cam_to_probabilities(maps_nHW: np.ndarray, background: float) -> np.ndarray:
    """Return a constant `background` and the activation maps, normalised to sum to one: float32 (1 + n) x H x W."""
    scores_nHW = np.concatenate([np.full((1, *maps_nHW.shape[1:]), background, np.float32), maps_nHW])
    return scores_nHW / scores_nHW.sum(0).clip(1e-6)


def cam_maps(sample: DecodedSample | OpenSample) -> np.ndarray:
    """Return the sample's activation maps at the image's size, float32 n x H x W in 0..1.

    Raises ShardError if a labelled sample has no CAM.
    """
    H, W = sample.size
    if sample.cam is None:
        if sample.classes:
            raise ShardError(f"{sample.name}: neither CAM nor seed; build the shards with --cams")
        return np.zeros((0, H, W), np.float32)
    maps_nHW = [resize_image(map_hw.astype(np.float32) / 255, (H, W)) for map_hw in sample.cam.maps_nhw]
    return np.stack(maps_nHW) if maps_nHW else np.zeros((0, H, W), np.float32)


def seed_mask(sample: DecodedSample | OpenSample, config: SeedConfig) -> np.ndarray:
    """Return the seed mask that training, evaluation, statistics and visualisations use for a sample, uint8 H x W.

    It is the sample's own seed mask if it has one. Otherwise its CAM gives the seed mask by the two thresholds of `config`, with
    a dense CRF if `config.crf` is set. Raises ShardError if a labelled sample has neither.
    """
    if sample.seed is not None:
        return sample.seed
    maps_nHW, classes = cam_maps(sample), sample.cam.classes if sample.cam else ()
    if config.crf is None:
        return cam_to_seed(maps_nHW, classes, config.background, config.foreground)
    return refined_seed(maps_nHW, classes, sample.image, config.background, config.foreground, config.crf)
