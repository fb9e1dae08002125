"""Sliding windows x scales x mirror images -> class probabilities of a whole image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weakclip.config import PseudoConfig
from weakclip.data import transforms
from weakclip.decoder import resize
from weakclip.model import WeakCLIP


@torch.inference_mode()
def predict(
    model: WeakCLIP, image_HW3: np.ndarray, config: PseudoConfig, scale: Sequence[int], text_KE: Tensor | None = None
) -> Tensor:
    """Probabilities, float32 K x H x W on the model's device, averaged over scales and mirror images.

    image_HW3: uint8 RGB. scale: `data.scale`. text_KE: `model.encode_names()`, where it is at hand.
    (Released code: aug_test; each pass is windows -> logits at the image's size -> softmax -> mirrored back.)
    """
    H, W = image_HW3.shape[:2]
    sizes = [transforms.scaled_size(H, W, scale, factor) for factor in config.scales]
    return average(model, image_HW3, sizes, config, model.encode_names() if text_KE is None else text_KE)


def average(
    model: WeakCLIP, image_HW3: np.ndarray, sizes: Sequence[tuple[int, int]], config: PseudoConfig, text_KE: Tensor
) -> Tensor:
    """Mean probabilities, float32 K x H x W, over the image resized to `sizes` (H, W), and over their mirror images."""
    H, W = image_HW3.shape[:2]
    total_KHW = torch.zeros((), device=text_KE.device)
    for size in sizes:
        scaled_HW3 = transforms.resize_image(image_HW3, size)
        x_3HW = model.normalisation.apply(torch.from_numpy(scaled_HW3).to(text_KE.device).permute(2, 0, 1).float())
        for mirror in (False, True) if config.flip else (False,):
            logits_1KHW = slide(model, x_3HW.flip(2) if mirror else x_3HW, config, text_KE)[None]
            probs_KHW = resize(logits_1KHW, (H, W)).softmax(1)[0]
            total_KHW = total_KHW + (probs_KHW.flip(2) if mirror else probs_KHW)
    return total_KHW / (len(sizes) * (2 if config.flip else 1))


def slide(model: WeakCLIP, x_3HW: Tensor, config: PseudoConfig, text_KE: Tensor) -> Tensor:
    """Logits, float32 K x H x W, of a normalised image: windows, averaged where they overlap."""
    H, W = x_3HW.shape[1:]
    windows = [(y, x) for y in starts(H, config.window, config.stride) for x in starts(W, config.window, config.stride)]
    h, w = min(config.window, H), min(config.window, W)
    sum_KHW, count_HW = x_3HW.new_zeros(model.num_classes, H, W), x_3HW.new_zeros(H, W)
    for first in range(0, len(windows), config.window_batch):
        part = windows[first : first + config.window_batch]
        logits_BKhw = window_logits(model, torch.stack([x_3HW[:, y : y + h, x : x + w] for y, x in part]), text_KE)
        for (y, x), logits_Khw in zip(part, logits_BKhw, strict=True):
            sum_KHW[:, y : y + h, x : x + w] += logits_Khw
            count_HW[y : y + h, x : x + w] += 1
    return sum_KHW / count_HW


def window_logits(model: WeakCLIP, x_B3HW: Tensor, text_KE: Tensor) -> Tensor:
    """Logits at the window's own size. A side under two patches, which the pyramid can't halve, is padded for the model."""
    h, w = x_B3HW.shape[2:]
    least = 2 * model.clip.vision.patch
    padded = F.pad(x_B3HW, (0, max(0, least - w), 0, max(0, least - h)))
    return resize(model(padded, text_KE).logits_BKhw.float(), padded.shape[2:])[:, :, :h, :w]


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride`, the last one moved back so that it ends with the image."""
    return [min(start, max(length - window, 0)) for start in range(0, max(length - window, 0) + stride, stride)]
