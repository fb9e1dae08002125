"""The precision in which a network computes."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import nn

_log = logging.getLogger(__name__)


def computes_in_bf16(precision: str, device: torch.device) -> bool:
    """Return whether matrix products are in bf16. precision: as in the config; auto is bf16 except on a CPU."""
    return precision == "bf16" or (precision == "auto" and device.type != "cpu")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast context of a forward pass."""
    enabled = computes_in_bf16(precision, device)
    if enabled and device.type == "cpu":
        _warn_if_slow()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@cache
def _warn_if_slow() -> None:
    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        _log.warning("precision=bf16: this CPU has neither AMX nor AVX512-bf16, and is over ten times slower than with fp32")


def to_bf16(frozen: nn.Module) -> None:
    """Convert the weights of linear layers, convolutions and attention to bf16, as autocast would at every step, for the same
    results. Other weights, such as those of layer norms, stay as they are."""
    for module in frozen.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.bfloat16()
