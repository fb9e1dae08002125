"""Sliding windows x scales x mirror images -> class probabilities of a whole image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weakclip.config import PseudoConfig
from weakclip.data import transforms
from weakclip.decoder import resize

Size = transforms.Size


class Predictor(NamedTuple):
    """What inference asks of a network."""

    logits: Callable[[Tensor], Tensor]
    """Normalised images, B x 3 x H x W, to logits, B x K x h x w, at a resolution of its own."""
    num_classes: int
    normalisation: transforms.Normalisation
    least_side: int
    """Pixels; smaller images are padded."""
    device: torch.device


@torch.inference_mode()
def predict(predictor: Predictor, image_HW3: np.ndarray, config: PseudoConfig, scale: Sequence[int]) -> Tensor:
    """Probabilities, float32 K x H x W on the predictor's device, averaged over scales and mirror images.

    image_HW3: uint8 RGB. scale: `data.scale`.
    (Released code: aug_test; each pass is windows -> logits at the image's size -> softmax -> mirrored back.)
    """
    H, W = image_HW3.shape[:2]
    sizes = [transforms.scaled_size(H, W, scale, factor) for factor in config.scales]
    return average(predictor, image_HW3, sizes, config)


def average(predictor: Predictor, image_HW3: np.ndarray, sizes: Sequence[Size], config: PseudoConfig) -> Tensor:
    """Mean probabilities, float32 K x H x W, over the image resized to `sizes` (H, W), and over their mirror images."""
    H, W = image_HW3.shape[:2]
    total_KHW = torch.zeros((), device=predictor.device)
    for size in sizes:
        scaled_HW3 = transforms.resize_image(image_HW3, size)
        x_3HW = predictor.normalisation.apply(torch.from_numpy(scaled_HW3).to(predictor.device).permute(2, 0, 1).float())
        for mirror in (False, True) if config.flip else (False,):
            logits_1KHW = slide(predictor, x_3HW.flip(2) if mirror else x_3HW, config)[None]
            probs_KHW = resize(logits_1KHW, (H, W)).softmax(1)[0]
            total_KHW = total_KHW + (probs_KHW.flip(2) if mirror else probs_KHW)
    return total_KHW / (len(sizes) * (2 if config.flip else 1))


def slide(predictor: Predictor, x_3HW: Tensor, config: PseudoConfig) -> Tensor:
    """Logits, float32 K x H x W, of a normalised image: windows, averaged where they overlap."""
    H, W = x_3HW.shape[1:]
    windows = [(y, x) for y in starts(H, config.window, config.stride) for x in starts(W, config.window, config.stride)]
    h, w = min(config.window, H), min(config.window, W)
    sum_KHW, count_HW = x_3HW.new_zeros(predictor.num_classes, H, W), x_3HW.new_zeros(H, W)
    for first in range(0, len(windows), config.window_batch):
        part = windows[first : first + config.window_batch]
        logits_BKhw = window_logits(predictor, torch.stack([x_3HW[:, y : y + h, x : x + w] for y, x in part]))
        for (y, x), logits_Khw in zip(part, logits_BKhw, strict=True):
            sum_KHW[:, y : y + h, x : x + w] += logits_Khw
            count_HW[y : y + h, x : x + w] += 1
    return sum_KHW / count_HW


def window_logits(predictor: Predictor, x_B3HW: Tensor) -> Tensor:
    """Logits at the window's own size, float32. A side too small for the network is padded."""
    h, w = x_B3HW.shape[2:]
    padded = F.pad(x_B3HW, (0, max(0, predictor.least_side - w), 0, max(0, predictor.least_side - h)))
    return resize(predictor.logits(padded).float(), padded.shape[2:])[:, :, :h, :w]


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride`, the last one moved back so that it ends with the image."""
    return [min(start, max(length - window, 0)) for start in range(0, max(length - window, 0) + stride, stride)]
