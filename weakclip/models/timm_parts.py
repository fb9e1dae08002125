"""The parts in which ViTs of timm differ from a ViT of open_clip, each put into one of open_clip.

All else of them stays open_clip's: the class token, the position embedding, the norms, the projection, and how a block runs.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class NormedLinear(nn.Linear):
    """A linear layer after a norm of its own."""

    def __init__(self, inputs: int, outputs: int, eps: float) -> None:
        super().__init__(inputs, outputs)
        self.norm = nn.LayerNorm(inputs, eps)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return super().forward(self.norm(x_BLD))


class GatedMlp(nn.Module):
    """The MLP of EVA02's blocks: SwiGLU with a norm before its last layer (Fang et al., arXiv 2303.11331)."""

    def __init__(self, width: int, inner: int, eps: float) -> None:
        super().__init__()
        self.c_gate, self.c_fc = nn.Linear(width, inner), nn.Linear(width, inner)
        self.c_proj = NormedLinear(inner, width, eps)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.c_proj(F.silu(self.c_gate(x_BLD)) * self.c_fc(x_BLD))


def make_rotary_and_gated(visual: Any) -> None:
    """Make it an EVA02 of size B or L: rotary position embeddings, and norms inside attention and gated MLPs."""
    visual.rotary_side = 16  # of the 224 pixels and patch 14 of the first pretraining, also in B with its patch 16
    for block in visual.transformer.resblocks:
        width, inner, eps = block.mlp.c_fc.in_features, block.mlp.c_fc.out_features, block.ln_1.eps
        block.attn.out_proj = NormedLinear(width, width, eps)
        block.mlp = GatedMlp(width, inner, eps)


def make_post_norm(visual: Any) -> None:
    """Make it an EVA02 of size E: a block's norms are after its attention and MLP, where open_clip's may have a layer scale."""
    for block in visual.transformer.resblocks:
        block.ls_1, block.ls_2 = block.ln_1, block.ln_2
        block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()


def make_conv_stem(visual: Any) -> None:
    """Make it a MobileCLIP-B: patches of 16 pixels are embedded by three convolutions (Vasu et al., arXiv 2311.17049).

    The batch norms between them are part of the convolutions, because the tower is never trained here.
    """
    width = visual.conv1.out_channels
    layers: list[tuple[str, nn.Module]] = [
        ("0", nn.Conv2d(3, width // 4, 4, stride=4)),
        ("gelu0", nn.GELU()),
        ("1", nn.Conv2d(width // 4, width // 4, 2, stride=2)),
        ("gelu1", nn.GELU()),
        ("2", nn.Conv2d(width // 4, width, 2, stride=2, bias=False)),
    ]
    visual.conv1 = nn.Sequential(OrderedDict(layers))
