"""Photometric distortion and normalisation, on the device, on the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


@cache
def _constant(values: tuple[float, float, float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return one value per channel, 3 x 1 x 1. It is kept, because copying it to a GPU would wait for the GPU."""
    with torch.inference_mode(False):  # training may use what a validation has made
        return torch.tensor(values, dtype=dtype, device=device).view(3, 1, 1)


class Normalisation(NamedTuple):
    """Mean and std of R, G, B on 0..255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of_unit(cls, mean: Sequence[float], std: Sequence[float]) -> Normalisation:
        """Return mean and std that are stated for 0..1; the one of NORMALISATIONS that they equal but for their rounding."""
        found = cls(*((255 * r, 255 * g, 255 * b) for r, g, b in (mean, std)))
        same = (n for n in NORMALISATIONS.values() if np.allclose(n, found, rtol=0, atol=0.1))
        return next(same, found)

    def apply(self, x_B3HW: Tensor) -> Tensor:
        """Return normalised images from float images in 0..255."""
        mean, std = (_constant(values, x_B3HW.dtype, x_B3HW.device) for values in self)
        return (x_B3HW - mean) / std

    def undo(self, x_B3HW: Tensor) -> Tensor:
        """Return float images in 0..255 from normalised images: the inverse of `apply`."""
        mean, std = (_constant(values, x_B3HW.dtype, x_B3HW.device) for values in self)
        return x_B3HW * std + mean


IMAGENET = Normalisation((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
NORMALISATIONS = {
    "imagenet": IMAGENET,
    "clip": Normalisation((122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)),
}


def distort(images_B3HW: Tensor, draws_B5: Tensor) -> Tensor:
    """Return photometrically distorted images, float32 B x 3 x H x W in 0..255, from 8-bit images and their draws.

    Brightness, contrast, saturation and hue are changed; contrast comes before or after the last two (as in mmseg's
    PhotoMetricDistortion). draws_B5: see transforms.draw_photometric.
    """
    brightness, contrast, saturation, hue, last = draws_B5[:, :, None, None, None].unbind(1)
    contrast, saturation = contrast.where(contrast != 0, 1.0), saturation.where(saturation != 0, 1.0)
    x_B3HW = images_B3HW.to(torch.float32, memory_format=torch.contiguous_format)  # the loader's memory is B x H x W x 3
    x_B3HW = (x_B3HW + brightness).clamp(0, 255)
    x_B3HW = (x_B3HW * contrast.where(last == 0, 1.0)).clamp(0, 255)
    x_B3HW = _shift_hue_and_saturation(x_B3HW, saturation, hue)
    return (x_B3HW * contrast.where(last == 1, 1.0)).clamp(0, 255)


def _shift_hue_and_saturation(rgb_B3HW: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Scale the saturation (and clip it to 1) and shift the hue, in degrees, as in HSV."""
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
    k_B3HW = (_constant((5.0, 3.0, 1.0), rgb_B3HW.dtype, rgb_B3HW.device) + turned_B1HW) % 6
    return value_B1HW - new_chroma_B1HW * torch.minimum(k_B3HW, 4 - k_B3HW).clamp(0, 1)
