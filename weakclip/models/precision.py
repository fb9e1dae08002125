"""The precision in which a network computes."""

from __future__ import annotations

import torch


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast context of a forward pass. precision: as in the config; auto is bf16 except on a CPU."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type != "cpu")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)
