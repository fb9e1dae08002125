"""Pyramid adapter: four frozen ViT maps of one resolution -> a feature pyramid at strides 4, 8, 16 and 32."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class PyramidAdapter(nn.Module):
    """Strides are for patch 16; with patch 14 they are 3.5, 7, 14 and 28. (Paper, section 3.2; released code: fpn1..fpn4.)"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.level1 = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.ConvTranspose2d(width, width, kernel_size=2, stride=2),
            nn.BatchNorm2d(width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, kernel_size=2, stride=2),
        )
        self.level2 = nn.Sequential(nn.GroupNorm(1, width), nn.ConvTranspose2d(width, width, kernel_size=2, stride=2))
        self.level3 = nn.GroupNorm(1, width)
        self.level4 = nn.Sequential(nn.GroupNorm(1, width), nn.MaxPool2d(kernel_size=2, stride=2))

    def forward(self, taps_BDhw: Sequence[Tensor]) -> list[Tensor]:
        """Four maps B x D x h x w -> B x D x (4h, 2h, h, h/2) x the same of w."""
        levels = (self.level1, self.level2, self.level3, self.level4)
        return [level(tap_BDhw) for level, tap_BDhw in zip(levels, taps_BDhw, strict=True)]
