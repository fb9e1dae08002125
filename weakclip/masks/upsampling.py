"""Upsampling of the windows' logits to probabilities at the image's size, tile by tile.

Three steps follow a window's forward pass: its logits are resized to its own size, averaged where windows overlap, and resized
to the image's size. Each step is linear and separable, and windows form a grid, so that all three together are two matrices: with
the logits of all windows side by side in l (r x c cells per class), the logits at the image's size are A_rows l A_columns^T. The
rows of both matrices sum to one and have no negative weights: a pixel is a weighted mean of cells, with the same weights for all
classes.

So the logsumexp over classes can be subtracted from each cell without changing the softmax, and no exponential overflows. Powers
of two are used, which torch computes about four times as fast as exp (2.13, AVX-512). The probabilities of a tile are contiguous
in memory; those of a whole image are more than a CPU's caches hold.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_SUM = 1e-20
"""Smallest sum of powers by which dividing is accurate. A NaN does not pass this test either."""
TILE = 64
"""Side, in pixels, of the tiles in which a CPU works: their values stay in its cache."""
WHOLE = 1 << 30
"""Side of a tile that no image exceeds: a GPU processes the whole image at once."""


class Grid(NamedTuple):
    """One axis of a pass: windows on the scaled image, cells in a window, pixels in the image."""

    begins: tuple[int, ...]
    """Start of each window, in pixels of the scaled image."""
    window: int
    """Side of a window, in pixels."""
    padded: int
    """Side of the padded window that the network saw, in pixels: at least `window`."""
    cells: int
    """Number of logits along this axis that the network gave for a window."""
    length: int
    """Side of the image, in pixels."""
    flipped: bool = False
    """Whether the scaled image was flipped along this axis; the upsampled logits are flipped back."""


Tiles = list[list[Tensor]]
"""Rows of tiles, float32 K x h x w each: the probabilities of an image or of some of its rows."""


class Span(NamedTuple):
    """Part of an axis: the pixels of one tile."""

    reach: slice
    """The cells that these pixels depend on, counted over all windows."""
    weights_pr: Tensor
    """float32, pixels x cells in reach."""


class Pass(NamedTuple):
    """The logits of all windows of one scaled and possibly flipped image."""

    logits_Krc: Tensor
    """float32; cells of all windows side by side."""
    rows: Grid
    columns: Grid


def interpolation(cells: int, length: int, align_corners: bool = False, device: torch.device | None = None) -> Tensor:
    """Return the weights of `F.interpolate` (bilinear) along an axis, float64 length x cells: 1 - distance, at least 0."""
    pixels_l = torch.arange(length, dtype=torch.float64, device=device)
    if align_corners:
        centres_l = pixels_l * ((cells - 1) / max(length - 1, 1))
    else:
        centres_l = ((pixels_l + 0.5) * (cells / length) - 0.5).clamp(0, cells - 1)
    cells_c = torch.arange(cells, dtype=torch.float64, device=device)
    return (1 - (centres_l[:, None] - cells_c).abs()).clamp(min=0)


@lru_cache(maxsize=256)
def spans(grid: Grid, tile: int, device: torch.device) -> tuple[Span, ...]:
    """Return the axis in parts of `tile` pixels; the last one may be shorter."""
    scaled = grid.begins[-1] + grid.window
    one_window_wc = interpolation(grid.cells, grid.padded)[: grid.window]
    all_windows_sc = torch.zeros(scaled, len(grid.begins) * grid.cells, dtype=torch.float64)
    for number, begin in enumerate(grid.begins):
        all_windows_sc[begin : begin + grid.window, number * grid.cells : (number + 1) * grid.cells] = one_window_wc
    all_windows_sc /= all_windows_sc.sum(1, keepdim=True)  # every window gives a pixel weights that sum to one
    weights_pc = interpolation(scaled, grid.length) @ all_windows_sc
    weights_pc = weights_pc.flip(0) if grid.flipped else weights_pc
    parts = []
    for first in range(0, grid.length, tile):
        part_pc = weights_pc[first : first + tile]
        cells_c = part_pc.any(0).nonzero()[:, 0]
        reach = slice(int(cells_c[0]), int(cells_c[-1]) + 1)
        parts.append(Span(reach, part_pc[:, reach].float().to(device)))
    return tuple(parts)


def upsample(logits_Krc: Tensor, rows: Span, columns: Span) -> Tensor:
    """Return the logits at the pixels of `rows` and `columns`, float32 K x h x w, from those of all cells."""
    return rows.weights_pr @ logits_Krc[:, rows.reach, columns.reach] @ columns.weights_pr.T


def logits_of(part: Pass) -> Tensor:
    """Return the logits of all classes at the image's size, float32 K x H x W."""
    (rows,), (columns,) = (spans(grid, WHOLE, part.logits_Krc.device) for grid in (part.rows, part.columns))
    return upsample(part.logits_Krc, rows, columns)


def blank(num_classes: int, H: int, W: int, tile: int, device: torch.device) -> Tiles:
    """Return tiles of zeros for an H x W image."""
    heights, widths = ([min(tile, side - first) for first in range(0, side, tile)] for side in (H, W))
    return [[torch.zeros(num_classes, h, w, device=device) for w in widths] for h in heights]


def joined(tiles: Tiles) -> Tensor:
    """Return the tiles as one tensor, float32 K x H x W."""
    return torch.cat([torch.cat(row, dim=2) for row in tiles], dim=1)


def add_probabilities(total: Tiles, part: Pass, weight: float, tile: int, first: int = 0) -> None:
    """Add `weight` times the class probabilities of a pass to `total`, which holds the rows of tiles from number `first` on."""
    device = part.logits_Krc.device
    rows, columns = (spans(grid, tile, device) for grid in (part.rows, part.columns))
    if tile == WHOLE:
        total[0][0].add_(upsample(part.logits_Krc, rows[0], columns[0]).softmax(0), alpha=weight)
        return
    binary_Krc = part.logits_Krc.log_softmax(0).mul_(math.log2(math.e))
    for row, tiles in zip(rows[first : first + len(total)], total, strict=True):
        binary_Khc = row.weights_pr @ binary_Krc[:, row.reach]
        for column, total_Khw in zip(columns, tiles, strict=True):
            powers_Khw = (binary_Khc[:, :, column.reach] @ column.weights_pr.T).exp2_()
            sum_hw = powers_Khw.sum(0)
            if float(sum_hw.min()) >= SMALLEST_SUM:
                total_Khw.addcmul_(powers_Khw, weight / sum_hw)
            else:  # neighbouring cells are certain of different classes, or hold a NaN
                logits_Khw = (binary_Khc[:, :, column.reach] @ column.weights_pr.T).mul_(math.log(2))
                total_Khw.add_(logits_Khw.softmax(0), alpha=weight)
