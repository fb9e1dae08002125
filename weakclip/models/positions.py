"""Resizing the position embedding of a ViT to another grid of patches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_positions(
    positions_LD: Tensor, grid: tuple[int, int], prefix: int = 1, mode: str = "bilinear", offset: float = 0.0
) -> Tensor:
    """Return the position embedding for a grid of h x w patches: (prefix + h w) x D.

    positions_LD: rows of `prefix` tokens without a position (class token), which are kept, then a square grid's, row by row.
    mode: bilinear (CLIP in the released WeakCLIP, Segmenter) or bicubic (MCTformer), without anti-aliasing.
    offset: added to h and w where the scale factor is computed: 0.1 in MCTformer's released code (and DINO's); 0: none.
    """
    side = math.isqrt(len(positions_LD) - prefix)
    if grid == (side, side):
        return positions_LD
    grid_1Dhw = positions_LD[prefix:].T.reshape(1, -1, side, side)
    if offset:
        factors = (grid[0] + offset) / side, (grid[1] + offset) / side
        grid_1Dhw = F.interpolate(grid_1Dhw, scale_factor=factors, mode=mode)
    else:
        grid_1Dhw = F.interpolate(grid_1Dhw, size=grid, mode=mode)
    return torch.cat([positions_LD[:prefix], grid_1Dhw.flatten(2)[0].T])


def has_square_grid(positions_LD: Tensor, prefix: int = 1) -> bool:
    """Return whether the rows after the first `prefix` form a square grid, as `resize_positions` requires."""
    tokens = len(positions_LD) - prefix
    return positions_LD.ndim == 2 and tokens > 0 and math.isqrt(tokens) ** 2 == tokens
