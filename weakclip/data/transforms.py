"""Augmentation: what is drawn depends on the sample's generator alone; what is done to the image is done to its seeds.

Geometry runs in the loader on 8-bit arrays, photometric distortion on the device, on the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from weakclip.config import AugmentConfig
from weakclip.labels import IGNORE


class Normalisation(NamedTuple):
    """Mean and deviation of R, G, B on 0..255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def apply(self, x_B3HW: Tensor) -> Tensor:
        mean, std = (x_B3HW.new_tensor(values).view(3, 1, 1) for values in self)
        return (x_B3HW - mean) / std

    def undo(self, x_B3HW: Tensor) -> Tensor:
        mean, std = (x_B3HW.new_tensor(values).view(3, 1, 1) for values in self)
        return x_B3HW * std + mean


IMAGENET = Normalisation((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
NORMALISATIONS = {
    "imagenet": IMAGENET,
    "clip": Normalisation((122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)),
}

cv2.setNumThreads(0)  # a loader process has one core


def scaled_size(H: int, W: int, scale: Sequence[int], factor: float) -> tuple[int, int]:
    """Size of an H x W image resized, keeping its shape, into `scale` (long, short side) times `factor`."""
    long_side, short_side = (int(side * factor) for side in scale)
    ratio = min(long_side / max(H, W), short_side / min(H, W))
    return max(1, int(H * ratio + 0.5)), max(1, int(W * ratio + 0.5))


def resize_image(image_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear without anti-aliasing, as published (mmcv resizes with OpenCV)."""
    return cv2.resize(image_HWC, size[::-1], interpolation=cv2.INTER_LINEAR)


def augment(
    image_HW3: np.ndarray, seed_HW: np.ndarray, rng: np.random.Generator, config: AugmentConfig, scale: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random resize, crop, flip and pad -> image uint8 c x c x 3, seed uint8 c x c, photometric draw float32 [5]."""
    size = scaled_size(seed_HW.shape[0], seed_HW.shape[1], scale, rng.uniform(config.ratio[0], config.ratio[1]))
    image_HW3 = resize_image(image_HW3, size)
    seed_HW = cv2.resize(seed_HW, size[::-1], interpolation=cv2.INTER_NEAREST)
    window = _crop_window(seed_HW, rng, config)
    image_HW3, seed_HW = image_HW3[window], seed_HW[window]
    if rng.random() < config.flip:
        image_HW3, seed_HW = image_HW3[:, ::-1], seed_HW[:, ::-1]
    bottom, right = config.crop - seed_HW.shape[0], config.crop - seed_HW.shape[1]
    image_HW3 = np.pad(image_HW3, ((0, bottom), (0, right), (0, 0)))
    seed_HW = np.pad(seed_HW, ((0, bottom), (0, right)), constant_values=IGNORE)
    return image_HW3, seed_HW, draw_photometric(rng) if config.photometric else np.zeros(5, np.float32)


def _crop_window(seed_HW: np.ndarray, rng: np.random.Generator, config: AugmentConfig) -> tuple[slice, slice]:
    """A crop, drawn again up to ten times while one class covers too much of what is seeded in it."""
    H, W = seed_HW.shape
    for _ in range(10):
        top = int(rng.integers(max(H - config.crop, 0) + 1))
        left = int(rng.integers(max(W - config.crop, 0) + 1))
        window = slice(top, top + config.crop), slice(left, left + config.crop)
        counts = np.bincount(seed_HW[window].ravel(), minlength=256)[:IGNORE]
        if (counts > 0).sum() > 1 and counts.max() < config.max_class_share * counts.sum():
            break
    return window


def draw_photometric(rng: np.random.Generator) -> np.ndarray:
    """Brightness shift, contrast, saturation (0 = leave as it is), hue shift (degrees of 360), contrast last (0 or 1)."""
    use_brightness, use_contrast, use_saturation, use_hue, contrast_last = rng.integers(2, size=5)
    return np.array(
        [
            use_brightness * rng.uniform(-32, 32),
            use_contrast * rng.uniform(0.5, 1.5),
            use_saturation * rng.uniform(0.5, 1.5),
            use_hue * 2 * rng.integers(-18, 18),
            contrast_last,
        ],
        np.float32,
    )


def distort(images_B3HW: Tensor, draws_B5: Tensor) -> Tensor:
    """8-bit images -> float images in 0..255.

    Brightness, contrast, saturation, hue, with contrast before or after the last two (mmseg's PhotoMetricDistortion).
    """
    brightness, contrast, saturation, hue, last = draws_B5[:, :, None, None, None].unbind(1)
    contrast, saturation = contrast.where(contrast != 0, 1.0), saturation.where(saturation != 0, 1.0)
    x_B3HW = (images_B3HW.float() + brightness).clamp(0, 255)
    x_B3HW = (x_B3HW * contrast.where(last == 0, 1.0)).clamp(0, 255)
    x_B3HW = _shift_hue_and_saturation(x_B3HW, saturation, hue)
    return (x_B3HW * contrast.where(last == 1, 1.0)).clamp(0, 255)


def _shift_hue_and_saturation(rgb_B3HW: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """In HSV: saturation is scaled (and clipped to 1), hue is turned by degrees."""
    value_B1HW, low_B1HW = rgb_B3HW.amax(1, keepdim=True), rgb_B3HW.amin(1, keepdim=True)
    chroma_B1HW = (value_B1HW - low_B1HW).clamp(min=1e-6)
    red, green, blue = rgb_B3HW.split(1, dim=1)
    sector_B1HW = torch.where(
        value_B1HW == red,
        (green - blue) / chroma_B1HW,
        torch.where(value_B1HW == green, 2 + (blue - red) / chroma_B1HW, 4 + (red - green) / chroma_B1HW),
    )
    turned_B1HW = sector_B1HW + hue / 60
    new_chroma_B1HW = torch.minimum((value_B1HW - low_B1HW) * saturation, value_B1HW)
    # RGB from HSV without branches: f(n) = V - C * max(0, min(k, 4 - k, 1)), k = (n + H / 60) mod 6, n = 5, 3, 1.
    k_B3HW = (torch.tensor([5.0, 3.0, 1.0], device=rgb_B3HW.device).view(3, 1, 1) + turned_B1HW) % 6
    return value_B1HW - new_chroma_B1HW * torch.minimum(k_B3HW, 4 - k_B3HW).clamp(0, 1)
