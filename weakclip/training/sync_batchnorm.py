"""Batch normalisation with the statistics of the global batch, on CPUs as well.

torch.nn.SyncBatchNorm runs on accelerators only. With this, two ranks on a CPU compute what one rank does with the
images of both, so that a run does not depend on the number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced too, since every rank's loss depends on every rank's statistics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


class CpuSyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that averages over all ranks, which must hold the same number of pixels."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x_BCHW)
        world = dist.get_world_size()
        moments_2C = torch.stack([x_BCHW.mean((0, 2, 3)), x_BCHW.square().mean((0, 2, 3))])
        mean_C, square_C = _SumOverRanks.apply(moments_2C / world)
        variance_C = square_C - mean_C.square()
        with torch.no_grad():
            count = world * x_BCHW.numel() // x_BCHW.shape[1]
            self.running_mean.lerp_(mean_C, self.momentum)  # type: ignore[union-attr, arg-type]
            self.running_var.lerp_(variance_C * count / (count - 1), self.momentum)  # type: ignore[union-attr, arg-type]
            self.num_batches_tracked += 1  # type: ignore[operator, assignment]
        scale_C = self.weight * torch.rsqrt(variance_C + self.eps)
        shift_C = self.bias - mean_C * scale_C
        return torch.addcmul(shift_C[:, None, None], x_BCHW, scale_C[:, None, None])


def synchronise(module: nn.Module, device: torch.device, ranks: int) -> nn.Module:
    """Return `module` with every BatchNorm2d converted to one that is synchronised over several ranks on `device`."""
    if ranks == 1:
        return module
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = CpuSyncBatchNorm2d
    return module
