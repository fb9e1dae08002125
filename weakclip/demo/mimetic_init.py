"""Mimetic initialization of a small transformer: attention and positions similar to those of large trained ones.

Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers" (ICML 2023). On the few images that a demo can draw, a ViT
with the usual random initialization is slow to learn spatial relations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class SelfAttention(NamedTuple):
    """Weights of one block: queries, keys and values [3 D, D], the output projection [D, D], and the number of heads."""

    qkv: Tensor
    projection: Tensor
    heads: int


@torch.no_grad()
def begin_near(blocks: Iterable[SelfAttention], positions_LD: Tensor) -> None:
    """Initialize in place so that tokens attend to similar and nearby tokens. positions_LD: of a square grid, row by row.

    Queries times keys start near the identity, values times the projection near its negative, and positions as sinusoids.
    """
    for qkv, projection, heads in blocks:
        width = len(projection)
        queries, keys, values = qkv.chunk(3)  # views [D, D], a head's rows together
        for rows in torch.arange(width).chunk(heads):
            left_DR, right_RD = _factors(0.7 * (_noise(width) + torch.eye(width)), len(rows))
            queries[rows], keys[rows] = left_DR.T, right_RD
        left_DD, values_DD = _factors(0.4 * (_noise(width) - torch.eye(width)), width)
        projection.copy_(left_DD)
        values.copy_(values_DD)
    positions_LD.copy_(0.3 * _sinusoids(math.isqrt(len(positions_LD)), positions_LD.shape[1]))


def _noise(width: int) -> Tensor:
    return torch.randn(width, width) / math.sqrt(width)


def _factors(product_DD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors [D, rank] and [rank, D] whose product is closest to the matrix."""
    u, s, vh = torch.linalg.svd(product_DD)
    return u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * vh[:rank]


def _sinusoids(side: int, width: int) -> Tensor:
    """Return [side * side, width]: sines and cosines of a token's column, then of its row."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    turns = 10000 ** (-torch.arange(width // 4) / (width // 4))
    angles = [place.flatten()[:, None] * turns for place in (columns, rows)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
