"""Class activation maps of a frozen CLIP, without training: softmax-GradCAM, then affinity by CLIP's own attention.

The method is CLIP-ES (Lin et al., "CLIP is Also an Efficient Segmenter", CVPR 2023). All of it runs in fp32.

H W image pixels, h x w token grid, L = h w patches, T = 1 + L tokens, D width, E joint embedding. C texts compete in the
softmax, the first n of which are the image's classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weakclip.cams import maps
from weakclip.config import CamConfig
from weakclip.data.transforms import Size
from weakclip.models.attention import attend, attention_weights
from weakclip.models.clip import FrozenClip, VisionTower, run_block

SINKHORN_ROUNDS = 10


def activation_maps(
    clip: FrozenClip, image_HW3: np.ndarray, texts_CE: Tensor, n: int, config: CamConfig, scale: Sequence[int], size: Size
) -> np.ndarray:
    """Return the maps of the first n texts, float32 n x `size`, each in 0..1, or all 0 where CLIP finds nothing.

    image_HW3: uint8 RGB. texts_CE: unit embeddings on the CLIP's device. scale: `data.scale`. size: h, w of the maps.
    """
    device, normalisation = texts_CE.device, clip.normalisation("cam.normalisation", config.normalisation)
    images = (maps.network_input(clip.vision.patch, image_HW3, normalisation, scale, factor, device) for factor in config.scales)
    return maps.average_maps(
        lambda image_13HW: maps_at_one_size(clip, image_13HW, texts_CE, n, config), images, config.flip, size
    )


def maps_at_one_size(clip: FrozenClip, image_13HW: Tensor, texts_CE: Tensor, n: int, config: CamConfig) -> Tensor:
    """Return the maps of the first n texts on the token grid, float32 n x h x w, each in 0..1, or all 0."""
    grid = image_13HW.shape[2] // clip.vision.patch, image_13HW.shape[3] // clip.vision.patch
    before = before_last_block(clip.vision, image_13HW, config.attention_blocks)
    maps_nL = maps.stretch(softmax_gradcam(clip, before, texts_CE, n))
    if config.affinity_steps:
        boxes_nL = boxes(maps_nL, grid, config.box_threshold)
        maps_nL = maps.stretch(spread(maps_nL, boxes_nL, before.attention_LL, config.affinity_steps))
    return maps_nL.unflatten(1, grid)


class BeforeLastBlock(NamedTuple):
    """What CAMs need of the vision tower's blocks."""

    tokens_1TD: Tensor
    """What enters the last one."""
    rotation_L2d: Tensor | None
    """Its rotary position embedding, if the tower has one."""
    attention_LL: Tensor
    """The patches' mean attention in the last blocks."""


@torch.no_grad()
def before_last_block(vision: VisionTower, image_13HW: Tensor, count: int) -> BeforeLastBlock:
    """Return what enters the last block, and the mean attention in the last `count` blocks."""
    x_1TD = vision.embed(image_13HW)
    rotation_L2d = vision.rotation((image_13HW.shape[2] // vision.patch, image_13HW.shape[3] // vision.patch))
    used = vision.blocks[-count:]
    total_LL = x_1TD.new_zeros(())
    for index, block in enumerate(vision.blocks):
        if index >= len(vision.blocks) - len(used):
            total_LL = total_LL + attention(block, x_1TD, rotation_L2d)[1:, 1:]
        if index < len(vision.blocks) - 1:
            x_1TD = run_block(block, x_1TD, rotation_L2d=rotation_L2d)
    return BeforeLastBlock(x_1TD, rotation_L2d, total_LL / len(used))


def attention(block: Any, x_1TD: Tensor, rotation_L2d: Tensor | None) -> Tensor:
    """Return how much token t (row) attends to each token in an open_clip block, T x T, the mean over heads; rows sum to 1."""
    attn = block.attn
    return attention_weights(block.ln_1(x_1TD), attn.in_proj_weight, attn.in_proj_bias, attn.num_heads, rotation_L2d)[0]


def softmax_gradcam(clip: FrozenClip, before: BeforeLastBlock, texts_CE: Tensor, n: int) -> Tensor:
    """Return maps, n x L >= 0.

    The gradient of a class's probability is taken with respect to the last block's normed input; its mean over the patches
    weights the channels of that input. Probabilities are used, not logits, so that evidence shared with a competing text cancels.
    """
    normed_1TD = clip.vision.blocks[-1].ln_1(before.tokens_1TD).detach().requires_grad_()
    probabilities_C = probabilities(clip, pooled(clip.vision, before, normed_1TD), texts_CE)
    gradients = [torch.autograd.grad(probabilities_C[i], normed_1TD, retain_graph=True)[0][0, 1:] for i in range(n)]
    weights_nD = torch.stack(gradients).mean(1)
    return (weights_nD @ normed_1TD.detach()[0, 1:].T).relu()


def pooled(vision: VisionTower, before: BeforeLastBlock, normed_1TD: Tensor) -> Tensor:
    """Return the image's unit embedding, E, after the last block: as in CLIP-ES the mean of its patches, not the class token.

    normed_1TD: the tokens that enter the block, after its first norm.
    """
    block = vision.blocks[-1]
    x_1TD = before.tokens_1TD + block.ls_1(attend(block.attn, normed_1TD, before.rotation_L2d))
    x_1TD = x_1TD + block.ls_2(block.mlp(block.ln_2(x_1TD)))
    return F.normalize(vision.ln_post(x_1TD)[0, 1:].mean(0) @ vision.proj, dim=0)


def probabilities(clip: FrozenClip, image_E: Tensor, texts_CE: Tensor) -> Tensor:
    """Return the probability of each text, C: CLIP's softmax over the competing texts. Both arguments hold unit vectors."""
    return (clip.logit_scale * texts_CE @ image_E).softmax(0)


def boxes(maps_nL: Tensor, grid: Size, threshold: float) -> Tensor:
    """Return 1 in the bounding box of each connected component of a map's cells >= `threshold`, else 0: float32 n x L."""
    masks_nhw = np.zeros((len(maps_nL), *grid), np.float32)
    for mask_hw, map_L in zip(masks_nhw, maps_nL.cpu().numpy(), strict=True):
        strong_hw = ((map_L >= threshold) & (map_L > 0)).reshape(grid).astype(np.uint8)
        parts = cv2.connectedComponentsWithStats(strong_hw, connectivity=8)[2]
        for left, top, width, height, _ in parts[1:]:  # the first component is the background
            mask_hw[top : top + height, left : left + width] = 1
    return torch.from_numpy(masks_nhw).flatten(1).to(maps_nL.device)


def spread(maps_nL: Tensor, boxes_nL: Tensor, attention_LL: Tensor, steps: int) -> Tensor:
    """Return the maps, masked by their boxes, after `steps` multiplications by the affinity matrix: n x L."""
    affinity_LL = sinkhorn(attention_LL)
    affinity_LL = (affinity_LL + affinity_LL.T) / 2
    maps_nL = maps_nL * boxes_nL
    for _ in range(steps):
        maps_nL = maps_nL @ affinity_LL
    return maps_nL


def sinkhorn(attention_LL: Tensor) -> Tensor:
    """Return a positive matrix scaled until its rows and columns sum to 1, so that all patches give and take equally much."""
    for _ in range(SINKHORN_ROUNDS):
        attention_LL = attention_LL / attention_LL.sum(0, keepdim=True)
        attention_LL = attention_LL / attention_LL.sum(1, keepdim=True)
    return attention_LL
