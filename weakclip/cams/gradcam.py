"""Class activation maps of a frozen CLIP, without training: softmax-GradCAM, then affinity by CLIP's own attention.

The method is CLIP-ES (Lin et al., "CLIP is Also an Efficient Segmenter", CVPR 2023). All of it runs in fp32.

H W image pixels, h x w token grid, L = h w patches, T = 1 + L tokens, D width, E joint embedding. C texts compete in the
softmax, the first n of which are the image's classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weakclip.config import CamConfig
from weakclip.data.photometric import NORMALISATIONS
from weakclip.data.transforms import Size, resize_image, scaled_size
from weakclip.models.clip import FrozenClip, VisionTower

SINKHORN_ROUNDS = 10


def activation_maps(
    clip: FrozenClip, image_HW3: np.ndarray, texts_CE: Tensor, n: int, config: CamConfig, scale: Sequence[int], size: Size
) -> np.ndarray:
    """Maps of the first n texts, float32 n x `size`, each from 0 to 1, or all 0 where CLIP finds nothing.

    image_HW3: uint8 RGB. texts_CE: unit embeddings on the CLIP's device. scale: `data.scale`. size: h, w of the maps.
    """
    device, normalisation = texts_CE.device, config.normalisation
    images = (network_input(clip.vision.patch, image_HW3, normalisation, scale, factor, device) for factor in config.scales)
    return average_maps(lambda image_13HW: maps_at_one_size(clip, image_13HW, texts_CE, n, config), images, config.flip, size)


def average_maps(maps_of: Callable[[Tensor], Tensor], images: Iterable[Tensor], flip: bool, size: Size) -> np.ndarray:
    """Maps averaged over `images`, 1 x 3 x H x W, one image at several sizes: float32 n x `size`, each from 0 to 1, or all 0.

    maps_of: such an image -> its maps, n x h x w. flip: average each with that of its mirror image.
    """
    found = []
    for image_13HW in images:
        for mirror in (False, True) if flip else (False,):
            maps_nhw = maps_of(image_13HW.flip(3) if mirror else image_13HW)
            maps_nhw = F.interpolate(maps_nhw[None], size=size, mode="bilinear")[0]
            found.append(maps_nhw.flip(2) if mirror else maps_nhw)
    total_nhw = torch.stack(found).sum(0)
    return stretch(total_nhw.flatten(1)).view_as(total_nhw).cpu().numpy()


def network_input(
    patch: int, image_HW3: np.ndarray, normalisation: str, scale: Sequence[int], factor: float, device: torch.device
) -> Tensor:
    """The image resized into `scale` times `factor`, its sides rounded to whole patches; normalised, 1 x 3 x H x W."""
    H, W = image_HW3.shape[:2]
    sides = scaled_size(H, W, scale, factor)
    height, width = (max(round(side / patch), 1) * patch for side in sides)
    resized_13HW = torch.from_numpy(resize_image(image_HW3, (height, width))).to(device).permute(2, 0, 1)[None].float()
    return NORMALISATIONS[normalisation].apply(resized_13HW)


def maps_at_one_size(clip: FrozenClip, image_13HW: Tensor, texts_CE: Tensor, n: int, config: CamConfig) -> Tensor:
    """Maps of the first n texts on the token grid, float32 n x h x w, each from 0 to 1, or all 0."""
    grid = image_13HW.shape[2] // clip.vision.patch, image_13HW.shape[3] // clip.vision.patch
    tokens_1TD, attention_LL = before_last_block(clip.vision, image_13HW, config.attention_blocks)
    maps_nL = stretch(softmax_gradcam(clip, tokens_1TD, texts_CE, n))
    if config.affinity_steps:
        maps_nL = stretch(spread(maps_nL, boxes(maps_nL, grid, config.box_threshold), attention_LL, config.affinity_steps))
    return maps_nL.unflatten(1, grid)


@torch.no_grad()
def before_last_block(vision: VisionTower, image_13HW: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens that enter the last block, 1 x T x D, and the patches' mean attention in the last `count` blocks, L x L."""
    x_1TD = vision.embed(image_13HW)
    used = vision.blocks[-count:]
    total_LL = x_1TD.new_zeros(())
    for index, block in enumerate(vision.blocks):
        if index >= len(vision.blocks) - len(used):
            total_LL = total_LL + attention(block, x_1TD)[1:, 1:]
        if index < len(vision.blocks) - 1:
            x_1TD = block(x_1TD)
    return x_1TD, total_LL / len(used)


def attention(block: Any, x_1TD: Tensor) -> Tensor:
    """How much token t (row) takes from each token in an open_clip block, T x T, the mean over heads; rows sum to 1."""
    return mean_attention(block.ln_1(x_1TD), block.attn.in_proj_weight, block.attn.in_proj_bias, block.attn.num_heads)[0]


def mean_attention(normed_BTD: Tensor, weight_DD: Tensor, bias_D: Tensor, heads: int) -> Tensor:
    """How much token t (row) takes from each token, B x T x T, the mean over heads; rows sum to 1.

    weight_DD, bias_D: of the linear layer that gives queries, keys and values, one below the other, 3 D rows.
    """
    D = normed_BTD.shape[2]
    qk_BT2D = F.linear(normed_BTD, weight_DD[: 2 * D], bias_D[: 2 * D])  # the last D rows are for the values
    q_BNTd, k_BNTd = (part_BTD.unflatten(2, (heads, -1)).transpose(1, 2) for part_BTD in qk_BT2D.split(D, dim=2))
    return (q_BNTd @ k_BNTd.mT / q_BNTd.shape[3] ** 0.5).softmax(-1).mean(1)


def softmax_gradcam(clip: FrozenClip, tokens_1TD: Tensor, texts_CE: Tensor, n: int) -> Tensor:
    """Maps n x L >= 0 from the tokens that enter the last block.

    A class's probability is differentiated by the last block's normed input; the gradient's mean over the patches weighs the
    channels of that input. Probabilities, not logits: so what speaks for a competing text as well cancels out.
    """
    normed_1TD = clip.vision.blocks[-1].ln_1(tokens_1TD).detach().requires_grad_()
    probabilities_C = probabilities(clip, pooled(clip.vision, tokens_1TD, normed_1TD), texts_CE)
    gradients = [torch.autograd.grad(probabilities_C[i], normed_1TD, retain_graph=True)[0][0, 1:] for i in range(n)]
    weights_nD = torch.stack(gradients).mean(1)
    return (weights_nD @ normed_1TD.detach()[0, 1:].T).relu()


def pooled(vision: VisionTower, tokens_1TD: Tensor, normed_1TD: Tensor) -> Tensor:
    """The image's unit embedding, E, after the last block: as in CLIP-ES the mean of its patches, not the class token.

    tokens_1TD: what enters the block. normed_1TD: the same after its first norm.
    """
    block = vision.blocks[-1]
    x_1TD = tokens_1TD + block.ls_1(block.attention(q_x=normed_1TD))
    x_1TD = x_1TD + block.ls_2(block.mlp(block.ln_2(x_1TD)))
    return F.normalize(vision.ln_post(x_1TD)[0, 1:].mean(0) @ vision.proj, dim=0)


def probabilities(clip: FrozenClip, image_E: Tensor, texts_CE: Tensor) -> Tensor:
    """Of each text, C: CLIP's softmax over those that compete. Both arguments hold unit vectors."""
    return (clip.logit_scale * texts_CE @ image_E).softmax(0)


def boxes(maps_nL: Tensor, grid: Size, threshold: float) -> Tensor:
    """1 in the bounding box of each connected part of a map that reaches `threshold`, else 0: n x L."""
    masks_nhw = np.zeros((len(maps_nL), *grid), np.float32)
    for mask_hw, map_L in zip(masks_nhw, maps_nL.cpu().numpy(), strict=True):
        strong_hw = ((map_L >= threshold) & (map_L > 0)).reshape(grid).astype(np.uint8)
        parts = cv2.connectedComponentsWithStats(strong_hw, connectivity=8)[2]
        for left, top, width, height, _ in parts[1:]:  # the first is all that is not strong
            mask_hw[top : top + height, left : left + width] = 1
    return torch.from_numpy(masks_nhw).flatten(1).to(maps_nL.device)


def spread(maps_nL: Tensor, boxes_nL: Tensor, attention_LL: Tensor, steps: int) -> Tensor:
    """What of each map lies in its boxes, handed on `steps` times along the attention: n x L."""
    affinity_LL = sinkhorn(attention_LL)
    affinity_LL = (affinity_LL + affinity_LL.T) / 2
    maps_nL = maps_nL * boxes_nL
    for _ in range(steps):
        maps_nL = maps_nL @ affinity_LL
    return maps_nL


def sinkhorn(attention_LL: Tensor) -> Tensor:
    """The matrix of positive numbers scaled until its rows and columns sum to 1, so that no patch gives or takes more."""
    for _ in range(SINKHORN_ROUNDS):
        attention_LL = attention_LL / attention_LL.sum(0, keepdim=True)
        attention_LL = attention_LL / attention_LL.sum(1, keepdim=True)
    return attention_LL


def stretch(maps_nL: Tensor) -> Tensor:
    """Each map moved and scaled to 0..1; one that is the same everywhere becomes 0.

    Affinity leaves a little of each map everywhere, which a division by the maximum alone would keep.
    """
    maps_nL = maps_nL - maps_nL.amin(1, keepdim=True)
    top_n1 = maps_nL.amax(1, keepdim=True)
    return maps_nL / top_n1.where(top_n1 > 0, 1.0)
