"""The three losses. p is a softmax over classes on a square grid; seeds are class indices with 255 = ignore.

B images, K classes, G grid side.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weakclip.config import LossConfig
from weakclip.crf import BOUNDARY, dense_crf
from weakclip.data.transforms import MEAN, STD
from weakclip.decoder import resize
from weakclip.labels import IGNORE


def weakclip_losses(
    logits_BKhw: Tensor, scores_BKhw: Tensor, seeds_BHW: Tensor, images_B3HW: Tensor, config: LossConfig
) -> dict[str, Tensor]:
    """The losses by name; their sum is what is minimised.

    logits: decoder's output. scores: score map in -1..1. seeds: int64 at the image's size. images: normalised.
    """
    G = config.grid
    # Published: corners are aligned exactly when both sizes are odd.
    logits_BKGG = resize(logits_BKhw.float(), (G, G), align_corners=bool(G % 2 and all(s % 2 for s in logits_BKhw.shape[2:])))
    probs_BKGG = logits_BKGG.softmax(1) + 1e-7
    probs_BKGG = probs_BKGG / probs_BKGG.sum(1, keepdim=True)
    seeds_BGG = F.interpolate(seeds_BHW[:, None].float(), size=(G, G), mode="nearest")[:, 0].long()
    losses = {"seeding": seeding_loss(probs_BKGG, seeds_BGG, config.balance)}
    if config.boundary:
        losses["boundary"] = boundary_loss(probs_BKGG, images_B3HW)
    if config.auxiliary:
        losses["auxiliary"] = config.auxiliary * auxiliary_loss(scores_BKhw, seeds_BHW, config.tau)
    return losses


def seeding_loss(probs_BKGG: Tensor, seeds_BGG: Tensor, balance: bool) -> Tensor:
    """Cross-entropy on seeded pixels; `balance` averages background and foreground apart, image by image, and adds them."""
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


def boundary_loss(probs_BKGG: Tensor, images_B3HW: Tensor) -> Tensor:
    """KL divergence from the dense CRF of p to p, the ratio clamped to 0.05..20 (no gradient outside)."""
    target_BKGG = boundary_target(probs_BKGG.detach(), images_B3HW)
    ratio_BKGG = (target_BKGG / probs_BKGG).clamp(0.05, 20)
    return (target_BKGG * ratio_BKGG.log()).sum(1).mean()


def boundary_target(probs_BKGG: Tensor, images_B3HW: Tensor) -> Tensor:
    """psi, B x K x G x G: mean field of p (floored at 1e-4) on the image at the grid's size, floored and renormalised."""
    # Published: corner-aligned sampling and truncation to 8 bit. Truncation makes the last bit matter, hence the double.
    small_B3GG = resize(images_B3HW.double(), probs_BKGG.shape[2:], align_corners=True).float()
    mean, std = (small_B3GG.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    images_BGG3 = (small_B3GG * std + mean).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    floored_BKGG = probs_BKGG.float().clamp(min=1e-4).cpu().numpy()
    psi_BKGG = np.stack([dense_crf(p, image, BOUNDARY) for p, image in zip(floored_BKGG, images_BGG3, strict=True)])
    target_BKGG = torch.from_numpy(psi_BKGG).to(probs_BKGG).clamp(min=1e-4)
    return target_BKGG / target_BKGG.sum(1, keepdim=True)


def auxiliary_loss(scores_BKhw: Tensor, seeds_BHW: Tensor, tau: float) -> Tensor:
    """Cross-entropy of the score map / tau at the seeds' size. The mean is over all pixels; ignored ones count as zero."""
    logits_BKHW = resize(scores_BKhw.float() / tau, seeds_BHW.shape[1:])
    return F.cross_entropy(logits_BKHW, seeds_BHW, ignore_index=IGNORE, reduction="sum") / seeds_BHW.numel()
