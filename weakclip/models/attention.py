"""Attention weights of a transformer block, which a fused attention kernel does not return."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention_weights(normed_BTD: Tensor, weight_DD: Tensor, bias_D: Tensor, heads: int) -> Tensor:
    """Return how much token t (row) attends to each token, B x T x T, the mean over heads; rows sum to 1.

    weight_DD, bias_D: those of the linear layer for queries, keys and values, stacked in 3 D rows.
    """
    D = normed_BTD.shape[2]
    qk_BT2D = F.linear(normed_BTD, weight_DD[: 2 * D], bias_D[: 2 * D])  # the last D rows are for the values
    q_BNTd, k_BNTd = (part_BTD.unflatten(2, (heads, -1)).transpose(1, 2) for part_BTD in qk_BT2D.split(D, dim=2))
    return (q_BNTd @ k_BNTd.mT / q_BNTd.shape[3] ** 0.5).softmax(-1).mean(1)
