"""Attention of a transformer block: its output by a fused kernel, and its weights, which such a kernel does not return."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from weakclip.models.rotary import rotate


def attend(attention: nn.MultiheadAttention, x_BLD: Tensor, rotation_L2d: Tensor | None = None, causal: bool = False) -> Tensor:
    """Return the output of `attention`. Calling the module would use tokens as L x B x D, which makes L small matrix products.

    rotation_L2d: rotary position embedding of the patches (weakclip.models.rotary), if it has one.
    """
    qkv_BL3D = F.linear(x_BLD, attention.in_proj_weight, attention.in_proj_bias)
    q_BHLd, k_BHLd, v_BHLd = qkv_BL3D.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q_BHLd, k_BHLd = rotate(q_BHLd, rotation_L2d), rotate(k_BHLd, rotation_L2d)
    mixed_BLD = F.scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd, is_causal=causal).transpose(1, 2).flatten(2)
    return attention.out_proj(mixed_BLD)


def attention_weights(
    normed_BTD: Tensor, weight_DD: Tensor, bias_D: Tensor, heads: int, rotation_L2d: Tensor | None = None
) -> Tensor:
    """Return how much token t (row) attends to each token, B x T x T, the mean over heads; rows sum to 1.

    weight_DD, bias_D: those of the linear layer for queries, keys and values, stacked in 3 D rows. rotation_L2d: as in `attend`.
    """
    D = normed_BTD.shape[2]
    qk_BT2D = F.linear(normed_BTD, weight_DD[: 2 * D], bias_D[: 2 * D])  # the last D rows are for the values
    q_BNTd, k_BNTd = (part_BTD.unflatten(2, (heads, -1)).transpose(1, 2) for part_BTD in qk_BT2D.split(D, dim=2))
    q_BNTd, k_BNTd = rotate(q_BNTd, rotation_L2d), rotate(k_BNTd, rotation_L2d)
    return (q_BNTd @ k_BNTd.mT / q_BNTd.shape[3] ** 0.5).softmax(-1).mean(1)
