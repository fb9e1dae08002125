"""Counting of floating-point operations, and model FLOPs utilisation (MFU).

MFU = operations an image x images a second / (GPUs x peak rate). The operations are those of the products and convolutions in the
network's forward and backward pass, without the losses and the CRF. The text tower runs once a batch.
"""

from __future__ import annotations

import re

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from weakclip.models.interface import Trained
from weakclip.runtime import compilation

PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "H20": 148e12, "L40S": 362e12, "B200": 2250e12, "B300": 2250e12}
"""Peak rates of GPUs by part of their name: dense bf16 products in FLOP/s (NVIDIA's data sheets, SXM versions)."""


def per_image(model: Trained, crop: int, batch: int) -> float:
    """Return the operations of a forward and a backward pass for one of `batch` images of crop x crop pixels."""
    one, two = (_of_batch(model, crop, images) for images in (1, 2))
    return (two - one) + (2 * one - two) / batch


def _of_batch(model: Trained, crop: int, images: int) -> int:
    was_training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    images_B3HW = torch.zeros(images, 3, crop, crop, device=trained[0].device)
    # As plain products, because the counter does not know every fused attention, such as a CPU's.
    with compilation.paused(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model.eval()(images_B3HW)  # batch norm keeps its statistics
        parts = (output,) if isinstance(output, torch.Tensor) else output
        learning = [part.sum() for part in parts if isinstance(part, torch.Tensor) and part.requires_grad]
        torch.autograd.backward(learning)  # the counter's hooks do not work with torch.autograd.grad
    for parameter in trained:
        parameter.grad = None
    model.train(was_training)
    return counter.get_total_flops()


def peak(device: torch.device) -> float | None:
    """Return the peak rate of a GPU in FLOP/s, or None where it is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if "PCIe" in name or "NVL" in name:  # slower variants
        return None
    return next((rate for part, rate in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
