"""Co-attention matching: texts and pixels attend to each other, then their cosine similarities form a score map.

B images, K classes, E joint embedding, D inner width, M = 1 + h * w visual tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weakclip.config import MatchingConfig
from weakclip.runtime.compilation import region


class Attention(nn.Module):
    """Multi-head attention from `query_BLD` to `memory_BMD`."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query_BLD: Tensor, memory_BMD: Tensor) -> Tensor:
        split = (self.heads, -1)
        q_BHLd = self.q_proj(query_BLD).unflatten(-1, split).transpose(1, 2)
        k_BHMd = self.k_proj(memory_BMD).unflatten(-1, split).transpose(1, 2)
        v_BHMd = self.v_proj(memory_BMD).unflatten(-1, split).transpose(1, 2)
        mixed_BLD = F.scaled_dot_product_attention(q_BHLd, k_BHMd, v_BHMd).transpose(1, 2).flatten(2)
        return self.dropout(self.proj(mixed_BLD))


class Layer(nn.Module):
    """Pre-norm self-attention, cross-attention (the memory is not normalised again) and MLP."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, dropout)
        self.cross_attn = Attention(width, heads, dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x_BLD: Tensor, memory_BMD: Tensor) -> Tensor:
        normed_BLD = self.norm1(x_BLD)
        x_BLD = x_BLD + self.self_attn(normed_BLD, normed_BLD)
        x_BLD = x_BLD + self.cross_attn(self.norm2(x_BLD), memory_BMD)
        return x_BLD + self.mlp(self.norm3(x_BLD))


class Branch(nn.Module):
    """Layers in which one side queries the other, and a projection back to the joint embedding."""

    def __init__(self, embedding: int, config: MatchingConfig) -> None:
        super().__init__()
        self.chained = config.chained
        self.layers = nn.ModuleList(Layer(config.width, config.heads, config.dropout) for _ in range(config.layers))
        self.out = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, embedding))
        if not config.chained:
            # Published: every layer reads the same input, so only the last one has an effect. The others are kept, untrained,
            # because released checkpoints hold them.
            self.layers[:-1].requires_grad_(False)

    def forward(self, x_BLD: Tensor, memory_BMD: Tensor) -> Tensor:
        for layer in self.layers if self.chained else self.layers[-1:]:
            x_BLD = layer(x_BLD, memory_BMD)
        return self.out(x_BLD)


class CoAttentionMatching(nn.Module):
    """Co-attention matching (paper, section 3.3; released code: ContextDecoder with its `anti` branch)."""

    def __init__(self, embedding: int, config: MatchingConfig) -> None:
        super().__init__()
        width = config.width
        self.visual_proj = nn.Sequential(nn.LayerNorm(embedding), nn.Linear(embedding, width), nn.LayerNorm(width))
        self.text_proj = nn.Sequential(nn.LayerNorm(embedding), nn.Linear(embedding, width))
        self.text_branch = Branch(embedding, config)
        self.visual_branch = Branch(embedding, config)
        self.alpha = nn.Parameter(torch.full((embedding,), config.temperature))
        self.beta = nn.Parameter(torch.full((embedding,), config.temperature))
        self.coattends = config.layers > 0
        if not self.coattends:
            self.requires_grad_(False)

    @region
    def forward(self, text_KE: Tensor, global_BE: Tensor, visual_BEhw: Tensor) -> Tensor:
        """Return the score map lambda, B x K x h x w: the cosine similarity of every pixel and every class, in -1..1."""
        text_BKE, pixels_BLE = self.attend(text_KE, global_BE, visual_BEhw)
        # In full precision: the auxiliary loss divides by 0.07, which would amplify bf16's rounding of a cosine.
        with torch.autocast(pixels_BLE.device.type, enabled=False):
            scores_BKL = F.normalize(text_BKE.float(), dim=-1) @ F.normalize(pixels_BLE.float(), dim=-1).transpose(1, 2)
        return scores_BKL.unflatten(2, visual_BEhw.shape[2:])

    def attend(self, text_KE: Tensor, global_BE: Tensor, visual_BEhw: Tensor) -> tuple[Tensor, Tensor]:
        """Return the texts t*, B x K x E, and pixels f*, B x hw x E, after they have attended to each other."""
        context_BME = torch.cat([global_BE.unsqueeze(1), visual_BEhw.flatten(2).transpose(1, 2)], dim=1)
        text_BKE = text_KE.to(context_BME.dtype).expand(context_BME.shape[0], -1, -1)
        if not self.coattends:
            return text_BKE, context_BME[:, 1:]
        text_BKD, visual_BMD = self.text_proj(text_BKE), self.visual_proj(context_BME)
        text_BKE = text_BKE + self.alpha * self.text_branch(text_BKD, visual_BMD)
        context_BME = context_BME + self.beta * self.visual_branch(visual_BMD, text_BKD)
        return text_BKE, context_BME[:, 1:]  # the class token only gave context
