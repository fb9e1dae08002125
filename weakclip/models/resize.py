"""Bilinear resizing whose backward pass is fast.

`F.interpolate` runs far below memory speed, and on a GPU its backward pass adds with atomics: at large factors it takes longer
than the network. Resizing is linear and separable. So two matrix products, or for a factor of two on a GPU a shift and a weighted
sum, give the same values and gradients in less time, on CPUs as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from weakclip.masks.upsampling import interpolation


def resize(x_BCHW: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Return maps resized bilinearly to H, W = `size`, as `F.interpolate` does."""
    H, W = x_BCHW.shape[2:]
    if tuple(size) == (H, W):
        return x_BCHW
    if x_BCHW.is_cuda and tuple(size) == (2 * H, 2 * W) and not align_corners:
        return doubled(x_BCHW)
    return by_matrices(x_BCHW, size, align_corners)


def by_matrices(x_BCHW: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Return maps resized by two matrix products: rows @ x @ columns^T. Half precision is computed in fp32, as torch does."""
    computed = torch.promote_types(x_BCHW.dtype, torch.float32)
    rows_Hh, columns_Ww = (
        _weights(before, after, align_corners, computed, x_BCHW.device)
        for before, after in zip(x_BCHW.shape[2:], size, strict=True)
    )
    with torch.autocast(x_BCHW.device.type, enabled=False):
        return (rows_Hh @ x_BCHW.to(computed) @ columns_Ww.T).to(x_BCHW.dtype)


def doubled(x_BCHW: Tensor) -> Tensor:
    """Return maps with both sides doubled, without aligned corners: each pixel is 3/4 its own cell and 1/4 the next nearest."""
    for dim in (2, 3):
        length = x_BCHW.shape[dim]
        before = torch.cat([x_BCHW.narrow(dim, 0, 1), x_BCHW.narrow(dim, 0, length - 1)], dim)
        after = torch.cat([x_BCHW.narrow(dim, 1, length - 1), x_BCHW.narrow(dim, length - 1, 1)], dim)
        x_BCHW = torch.stack([0.75 * x_BCHW + 0.25 * before, 0.75 * x_BCHW + 0.25 * after], dim + 1).flatten(dim, dim + 1)
    return x_BCHW


def _weights(before: int, after: int, align_corners: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the bilinear weights along an axis, `after` x `before`."""
    if torch.compiler.is_compiling():  # a compiled region computes them within its other work
        return interpolation(before, after, align_corners, device).to(dtype)
    return _kept_weights(before, after, align_corners, dtype, device)


@lru_cache(maxsize=64)
def _kept_weights(before: int, after: int, align_corners: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # training may use what a validation has made
        return interpolation(before, after, align_corners, device).to(dtype)
