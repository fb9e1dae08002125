"""Logits of windows -> probabilities at the image's size, tile by tile, without the classes that cannot matter there.

Three steps follow a window's forward: its logits are resized to its own size, averaged where windows overlap, and resized to
the image's size. Each is linear and works on one axis at a time, and windows form a grid, so all three together are two matrices:
with all windows' logits side by side in l (r x c cells a class), logits at the image's size are A_rows l A_columns^T. Their
rows sum to one and have no negative weights: a pixel is a weighted mean of cells, with the same weights for all classes.

That bounds probabilities before anything is computed at full size. Subtract the logsumexp over classes from each cell (a
softmax does not notice); no class' mean then exceeds its largest value in the cells that a tile of pixels sees, so classes with
small values everywhere in those cells can be left out, and the sum over the others says how large an error that is at most. (The
surer a network, the more: of COCO's 81 classes 13 in a tile on average for one, 35 for a surer one.) The rest is exponentials,
which are powers of two here: torch makes those about four times as fast as exp (2.13, AVX-512). Each tile's probabilities lie
together in memory.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_ERROR = 1e-3
"""Most that probabilities of a pixel may lose to classes that are left out, all of them together: a quarter of what an 8-bit
probability can show."""
SMALLEST_SUM = 1e-20
"""Of powers, that still divides without a loss; a NaN is none either."""
TILE = 64
"""Side, pixels, of the squares in which a CPU works: classes that matter in one are few, and their values stay in its cache."""
WHOLE = 1 << 30
"""Side of a tile that no image exceeds: a GPU does more than needed sooner than it asks what is needed."""


class Grid(NamedTuple):
    """One axis of a pass: windows on the scaled image, cells in a window, pixels in the image."""

    begins: tuple[int, ...]
    """Where windows begin, pixels of the scaled image."""
    window: int
    """Their side, pixels."""
    padded: int
    """Side that the network saw, pixels: at least `window`."""
    cells: int
    """Logits that it gave for it."""
    length: int
    """Side of the image, pixels."""
    mirrored: bool = False
    """The scaled image was mirrored along this axis, the logits are wanted unmirrored."""


Tiles = list[list[Tensor]]
"""Rows of tiles, float32 K x h x w each: probabilities of an image or of some of its rows."""


class Span(NamedTuple):
    """Part of an axis: the pixels of one tile."""

    cells_c: Tensor
    """int64: which cells they are means of, counted over all windows."""
    reach: slice
    """From the first of them to the last."""
    weights_pr: Tensor
    """float32, pixels x cells in reach."""


class Pass(NamedTuple):
    """The logits of all windows of one scaled and perhaps mirrored image."""

    logits_Krc: Tensor
    """float32; cells of all windows side by side."""
    rows: Grid
    columns: Grid


def interpolation(cells: int, length: int) -> Tensor:
    """float64 length x cells, the weights of `F.interpolate` (bilinear, align_corners false) along an axis."""
    return F.interpolate(torch.eye(cells, dtype=torch.float64)[None], size=length, mode="linear")[0].T


@lru_cache(maxsize=256)
def spans(grid: Grid, tile: int, device: torch.device) -> tuple[Span, ...]:
    """The axis in parts of `tile` pixels."""
    scaled = grid.begins[-1] + grid.window
    one_window_wc = interpolation(grid.cells, grid.padded)[: grid.window]
    all_windows_sc = torch.zeros(scaled, len(grid.begins) * grid.cells, dtype=torch.float64)
    for number, begin in enumerate(grid.begins):
        all_windows_sc[begin : begin + grid.window, number * grid.cells : (number + 1) * grid.cells] = one_window_wc
    all_windows_sc /= all_windows_sc.sum(1, keepdim=True)  # every window gives a pixel weights that sum to one
    weights_pc = interpolation(scaled, grid.length) @ all_windows_sc
    weights_pc = weights_pc.flip(0) if grid.mirrored else weights_pc
    parts = []
    for first in range(0, grid.length, tile):
        part_pc = weights_pc[first : first + tile]
        cells_c = part_pc.any(0).nonzero()[:, 0]
        reach = slice(int(cells_c[0]), int(cells_c[-1]) + 1)
        parts.append(Span(cells_c.to(device), reach, part_pc[:, reach].float().to(device)))
    return tuple(parts)


def upsample(logits_Krc: Tensor, rows: Span, columns: Span) -> Tensor:
    """Logits at the pixels of `rows` and `columns`, from those of all cells: K x h x w."""
    return rows.weights_pr @ logits_Krc[:, rows.reach, columns.reach] @ columns.weights_pr.T


def logits_of(part: Pass) -> Tensor:
    """float32 K x H x W, all classes everywhere."""
    (rows,), (columns,) = (spans(grid, WHOLE, part.logits_Krc.device) for grid in (part.rows, part.columns))
    return upsample(part.logits_Krc, rows, columns)


def blank(num_classes: int, H: int, W: int, tile: int, device: torch.device) -> Tiles:
    """Zeros."""
    heights, widths = ([min(tile, side - first) for first in range(0, side, tile)] for side in (H, W))
    return [[torch.zeros(num_classes, h, w, device=device) for w in widths] for h in heights]


def joined(tiles: Tiles) -> Tensor:
    """K x H x W."""
    return torch.cat([torch.cat(row, dim=2) for row in tiles], dim=1)


def add_probabilities(total: Tiles, part: Pass, weight: float, tile: int, first: int = 0) -> None:
    """Add `weight` times the pass' class probabilities to `total`, the rows of tiles from number `first` on.

    Where tiles are smaller than the image, a class that cannot matter in one is taken as 0 there; no probability is off by more
    than LARGEST_ERROR.
    """
    device = part.logits_Krc.device
    rows, columns = (spans(grid, tile, device) for grid in (part.rows, part.columns))
    if tile == WHOLE:
        total[0][0].add_(upsample(part.logits_Krc, rows[0], columns[0]).softmax(0), alpha=weight)
        return
    binary_Krc = part.logits_Krc.log_softmax(0).mul_(math.log2(math.e))
    for row, tiles in zip(rows[first : first + len(total)], total, strict=True):
        highest_Kc = binary_Krc[:, row.cells_c].amax(1)
        binary_Khc = row.weights_pr @ binary_Krc[:, row.reach]
        for column, total_Khw in zip(columns, tiles, strict=True):
            bounds_K = highest_Kc[:, column.cells_c].amax(1).exp2()
            if not _add_those_that_matter(total_Khw, binary_Khc[:, :, column.reach], bounds_K, column.weights_pr, weight):
                logits_Khw = binary_Khc[:, :, column.reach] @ column.weights_pr.T
                total_Khw.add_(logits_Khw.mul_(math.log(2)).softmax(0), alpha=weight)


def _add_those_that_matter(total_Khw: Tensor, binary_Khr: Tensor, bounds_K: Tensor, weights_wr: Tensor, weight: float) -> bool:
    """Add the probabilities of one tile, unless too much would be missing: then nothing is added, and the answer is False.

    binary_Khr: binary logarithms at the tile's rows and at the cells in reach of its columns, whose weights are weights_wr. A
    pixel's probabilities are 2^z_k over the sum of 2^z_j. bounds_K: what no 2^z_k exceeds.
    """
    ascending_K, classes_K = bounds_K.sort()
    missing_K = ascending_K.cumsum(0)
    dropped = int((missing_K <= LARGEST_ERROR / 4).sum())  # the sum is rarely less than 1/4
    if dropped < len(bounds_K) / 2:  # picking the others would take longer than the exponentials of all
        missing, kept_n = 0.0, None
    else:
        missing, kept_n = float(missing_K[dropped - 1]), classes_K[dropped:].sort().values
    powers_nhw = ((binary_Khr if kept_n is None else binary_Khr[kept_n]) @ weights_wr.T).exp2_()
    sum_hw = powers_nhw.sum(0)
    if not float(sum_hw.min()) >= max(missing / LARGEST_ERROR, SMALLEST_SUM):
        return False
    if kept_n is None:
        total_Khw.addcmul_(powers_nhw, weight / sum_hw)
    else:
        total_Khw.index_add_(0, kept_n, powers_nhw.mul_(weight / sum_hw))
    return True
