"""Counting of floating-point operations, and model FLOPs utilisation (MFU).

MFU = operations an image x images a second / (GPUs x peak rate). The operations are those of the products and convolutions in the
network's forward and backward pass, without the losses and the CRF.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from weakclip.models.interface import Trained
from weakclip.runtime import compilation

PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "H20 ": 148e12, "L40S": 362e12, "B200": 2250e12, "B300": 2250e12}
"""Peak rates of GPUs by part of their name: dense bf16 products in FLOP/s (NVIDIA's data sheets, SXM versions)."""


def per_image(model: Trained, crop: int) -> int:
    """Return the operations of a forward and a backward pass for one image of crop x crop pixels."""
    was_training, trained = model.training, [p for p in model.parameters() if p.requires_grad]
    image_13HW = torch.zeros(1, 3, crop, crop, device=trained[0].device)
    with compilation.paused(), FlopCounterMode(display=False) as counter:
        output = model.eval()(image_13HW)  # batch norm keeps its statistics
        maps = [output] if isinstance(output, torch.Tensor) else [part for part in output if isinstance(part, torch.Tensor)]
        torch.autograd.grad([part.sum() for part in maps], trained, allow_unused=True)
    model.train(was_training)
    return counter.get_total_flops()


def peak(device: torch.device) -> float | None:
    """Return the peak rate of a GPU in FLOP/s, or None where it is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAKS.items() if part in name), None)
