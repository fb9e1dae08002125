"""The three losses. p is a softmax over classes on a coarse grid; seeds are class indices with 255 = ignore.

B images, K classes, GG the grid's height and width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weakclip import registry
from weakclip.config import BoundaryConfig, LossConfig
from weakclip.data.photometric import IMAGENET, Normalisation
from weakclip.labels import IGNORE
from weakclip.masks.crf import BOUNDARY, boundary_crfs
from weakclip.masks.mean_field import mean_field
from weakclip.models.resize import resize
from weakclip.registry import LOSSES
from weakclip.runtime.compilation import region
from weakclip.runtime.workers import cores


@dataclass(frozen=True)
class LossInputs:
    """The inputs of the losses of one batch. weakclip.registry.LOSSES lists the functions that take it."""

    logits_BKhw: Tensor
    """The decoder's output."""
    scores_BKhw: Tensor
    """The score map, in -1..1."""
    seeds_BHW: Tensor
    """int64 at the image's size: class indices and 255."""
    images_B3HW: Tensor
    """Normalised images."""
    config: LossConfig
    boundary: BoundaryConfig = field(default_factory=BoundaryConfig)
    normalisation: Normalisation = IMAGENET

    @cached_property
    def grid(self) -> OnGrid:
        """Logits, probabilities and seeds at the resolution of the seeding and the boundary loss."""
        return on_grid(self.logits_BKhw, self.seeds_BHW, self.config)


def weighted_losses(inputs: LossInputs) -> dict[str, Tensor]:
    """Return the losses with a positive weight in `loss.weights`, by name, each times its weight; their sum is minimised."""
    weights = {name: inputs.config.weights.get(name, 0.0) for name in LOSSES}
    return {name: weights[name] * registry.load(path)(inputs) for name, path in LOSSES.items() if weights[name]}


def seeding(inputs: LossInputs) -> Tensor:
    """Return the cross-entropy on seeded pixels, a scalar; see `seeding_loss`."""
    return seeding_loss(inputs.grid.probs_BKGG, inputs.grid.seeds_BGG, inputs.config.balance)


def boundary(inputs: LossInputs) -> Tensor:
    """Return the divergence of the network's probabilities from a dense CRF's output on them, a scalar; see `boundary_loss`."""
    config, probs_BKGG = inputs.boundary, inputs.grid.probs_BKGG
    images_BGG3 = crf_images(inputs.images_B3HW, inputs.config.grid, inputs.normalisation, config.truncate_image)
    target_BKGG = boundary_target(probs_BKGG.detach(), images_BGG3, config.engine)
    return boundary_loss(probs_BKGG, target_BKGG, config.ratio_clamp)


def auxiliary(inputs: LossInputs) -> Tensor:
    """Return the cross-entropy of the score map, a scalar; see `auxiliary_loss`."""
    return auxiliary_loss(inputs.scores_BKhw, inputs.seeds_BHW, inputs.config.tau)


class OnGrid(NamedTuple):
    """Logits, probabilities and seeds (int64) on the grid of `loss.grid`."""

    logits_BKGG: Tensor
    probs_BKGG: Tensor
    seeds_BGG: Tensor


@region
def on_grid(logits_BKhw: Tensor, seeds_BHW: Tensor, config: LossConfig) -> OnGrid:
    """Return logits, probabilities and seeds at the resolution of the seeding and the boundary loss."""
    odd = all(side % 2 for side in config.grid)
    logits_BKGG = resize(logits_BKhw.float(), config.grid, odd if config.align_corners is None else config.align_corners)
    probs_BKGG = logits_BKGG.softmax(1) + 1e-7
    seeds_BGG = F.interpolate(seeds_BHW[:, None].float(), size=tuple(config.grid), mode="nearest")[:, 0].long()
    return OnGrid(logits_BKGG, probs_BKGG / probs_BKGG.sum(1, keepdim=True), seeds_BGG)


@region
def seeding_loss(probs_BKGG: Tensor, seeds_BGG: Tensor, balance: bool) -> Tensor:
    """Return the cross-entropy on seeded pixels. balance: average background and foreground separately per image and add them."""
    seeded_BGG = seeds_BGG != IGNORE
    target_B1GG = seeds_BGG.where(seeded_BGG, seeds_BGG.new_zeros(()))[:, None]
    nll_BGG = -probs_BKGG.log().gather(1, target_B1GG)[:, 0]
    if not balance:
        return (nll_BGG * seeded_BGG).sum() / seeded_BGG.sum().clamp(min=1)
    total = nll_BGG.new_zeros(())
    for region_BGG in (seeds_BGG == 0, seeded_BGG & (seeds_BGG != 0)):
        count_B = region_BGG.sum((1, 2)).clamp(min=1e-4)
        total = total + ((nll_BGG * region_BGG).sum((1, 2)) / count_B).mean()
    return total


@region
def boundary_loss(probs_BKGG: Tensor, target_BKGG: Tensor, ratio_clamp: Sequence[float] | None) -> Tensor:
    """Return the KL divergence from the target psi to p, with psi / p clamped to `ratio_clamp` (no gradient outside)."""
    ratio_BKGG = target_BKGG / probs_BKGG
    if ratio_clamp:
        ratio_BKGG = ratio_BKGG.clamp(*ratio_clamp)
    return (target_BKGG * ratio_BKGG.log()).sum(1).mean()


def crf_images(images_B3HW: Tensor, grid: Sequence[int], normalisation: Normalisation, truncate: bool) -> Tensor:
    """Return the images that the boundary loss' CRF sees, uint8 RGB B x GG x 3. (Released code: dgcn_crf_operation.)"""
    # Published: corner-aligned sampling and truncation. With truncation the last bit matters, hence float64 and F.interpolate.
    small_B3GG = F.interpolate(images_B3HW.double(), size=tuple(grid), mode="bilinear", align_corners=True)
    small_B3GG = normalisation.undo(small_B3GG.float())
    small_B3GG = small_B3GG if truncate else small_B3GG.round()
    return small_B3GG.clamp(0, 255).byte().permute(0, 2, 3, 1)


def boundary_target(probs_BKGG: Tensor, images_BGG3: Tensor, engine: str) -> Tensor:
    """Return psi, B x K x GG: the mean-field marginals of p (floored at 1e-4) on the images, floored and renormalised.

    engine: as in `boundary.engine`. The two agree in 97 % of the pixels' likeliest classes (docs/fidelity.md).
    """
    floored_BKGG = probs_BKGG.float().clamp(min=1e-4)
    if engine == "exact" or (engine == "auto" and probs_BKGG.is_cuda):
        psi_BKGG = mean_field(floored_BKGG, images_BGG3, BOUNDARY)
    else:
        psi_BKGG = _lattice(floored_BKGG, images_BGG3)
    target_BKGG = psi_BKGG.clamp(min=1e-4)
    return target_BKGG / target_BKGG.sum(1, keepdim=True)


def _lattice(probs_BKGG: Tensor, images_BGG3: Tensor) -> Tensor:
    """Return the mean-field marginals that pydensecrf computes, several images at a time on the cores of this rank."""
    # On a CPU torch's threads wait meanwhile, so their cores are free. Only torchrun gives all ranks of a node the same cores,
    # and it sets LOCAL_WORLD_SIZE. Threads would not help, as pydensecrf holds the GIL.
    threads = cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if probs_BKGG.is_cuda else torch.get_num_threads()
    pairs = zip(probs_BKGG.cpu().numpy(), images_BGG3.cpu().numpy(), strict=True)
    return torch.from_numpy(np.stack(boundary_crfs(pairs, min(threads, len(probs_BKGG))))).to(probs_BKGG)


@region
def auxiliary_loss(scores_BKhw: Tensor, seeds_BHW: Tensor, tau: float) -> Tensor:
    """Return the cross-entropy of the score map / tau at the seeds' size: a mean over all pixels, where ignored ones are zero."""
    logits_BKHW = resize(scores_BKhw.float() / tau, seeds_BHW.shape[1:])
    return F.cross_entropy(logits_BKHW, seeds_BHW, ignore_index=IGNORE, reduction="sum") / seeds_BHW.numel()
