"""Rotary position embeddings, as in EVA02's vision tower: angles of a patch's row and column turn its queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from weakclip.runtime.torchvision_ops import declare_missing

declare_missing()
from timm.layers import apply_rot_embed_cat, build_rotary_pos_embed


def rotation(grid: tuple[int, int], width: int, side: int, device: torch.device) -> Tensor:
    """Return the sines and cosines of the angles of h x w patches, row by row: float32 (h w) x 2 d. width: d, that of a head.

    side: rows and columns of the grid that the angles are of. Another grid is stretched over it, each side by itself, so that row
    i of h is at side * i / h, as in timm. The resized position embedding is stretched over the grid in the same way.
    """
    shape, pretrained = list(grid), [side, side]
    return torch.cat(build_rotary_pos_embed(shape, dim=width, in_pixels=False, ref_feat_shape=pretrained, device=device), dim=1)


def rotate(x_BHLd: Tensor, rotation_L2d: Tensor | None) -> Tensor:
    """Return queries or keys with those of the patches turned; the first token, of the class, has no place. None: no rotation."""
    if rotation_L2d is None:
        return x_BHLd
    return torch.cat([x_BHLd[:, :, :1], apply_rot_embed_cat(x_BHLd[:, :, 1:], rotation_L2d)], dim=2)
