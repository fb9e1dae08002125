"""At which precision a network computes."""

from __future__ import annotations

import torch


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a forward pass runs. precision: the config's; auto is bf16 everywhere but on a CPU."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type != "cpu")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)
