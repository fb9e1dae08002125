"""Pyramid adapter: four frozen ViT maps of one resolution -> a feature pyramid at strides 4, 8, 16 and 32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weakclip.runtime.compilation import region


class Doubling(nn.ConvTranspose2d):
    """2x2 transposed convolution of stride 2, which doubles both sides of a map.

    Its patches don't overlap, so it is computed as a 1x1 convolution to four times as many channels, whose four parts are then
    interleaved. This is the same sum; forward and backward took 27 to 40 % less time at full size on a CPU, and 8 % in the demo.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, width, kernel_size=2, stride=2)

    def forward(self, x_BDhw: Tensor, then: tuple[Tensor, Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """Return B x D x 2h x 2w. With `then`, weight O x D and bias O of a 1x1 convolution that follows, B x O x 2h x 2w.

        The two linear maps are merged: the kernel is convolved instead of the map, so the intermediate map, which is four times
        as large, is not materialised.
        """
        assert self.bias is not None
        weight_DOhw, bias_O = self.weight, self.bias
        if then is not None:
            outer_OD, outer_O = then
            weight_DOhw, bias_O = torch.einsum("idhw,od->iohw", self.weight, outer_OD), outer_OD @ self.bias + outer_O
        weight_PD = weight_DOhw.flatten(1).T  # P: output channel, row and column within a patch
        patches_BPhw = F.conv2d(x_BDhw, weight_PD[:, :, None, None], bias_O.repeat_interleave(4))
        return F.pixel_shuffle(patches_BPhw, 2)


class Level(NamedTuple):
    """One map of the pyramid, before its last doubling if it has one."""

    features_BDhw: Tensor
    doubling: Doubling | None = None

    @property
    def map_BDHW(self) -> Tensor:
        """The map itself."""
        return self.features_BDhw if self.doubling is None else self.doubling(self.features_BDhw)

    def convolved(self, weight_OD: Tensor, bias_O: Tensor) -> Tensor:
        """Return a 1x1 convolution of the map, B x O x H x W."""
        if self.doubling is None:
            return F.conv2d(self.features_BDhw, weight_OD[:, :, None, None], bias_O)
        return self.doubling(self.features_BDhw, (weight_OD, bias_O))


class _Doubled(nn.Sequential):
    """Modules, the last of which is a doubling."""

    def forward(self, x_BDhw: Tensor) -> Level:  # type: ignore[override]
        *before, doubling = self
        for module in before:
            x_BDhw = module(x_BDhw)
        assert isinstance(doubling, Doubling)
        return Level(x_BDhw, doubling)


class PyramidAdapter(nn.Module):
    """The adapter (paper, section 3.2; released code: fpn1..fpn4). With patch 14 the strides are 3.5, 7, 14 and 28."""

    def __init__(self, width: int) -> None:
        super().__init__()
        norm = nn.GroupNorm(1, width)
        self.level1 = _Doubled(norm, Doubling(width), nn.BatchNorm2d(width), nn.GELU(), Doubling(width))
        self.level2 = _Doubled(nn.GroupNorm(1, width), Doubling(width))
        self.level3 = nn.GroupNorm(1, width)
        self.level4 = nn.Sequential(nn.GroupNorm(1, width), nn.MaxPool2d(kernel_size=2, stride=2))

    @region
    def forward(self, taps_BDhw: Sequence[Tensor]) -> list[Level]:
        """Return the levels of four maps B x D x h x w: B x D x (4h, 2h, h, h/2) x (4w, 2w, w, w/2)."""
        first, second, third, fourth = taps_BDhw
        return [self.level1(first), self.level2(second), Level(self.level3(third)), Level(self.level4(fourth))]
