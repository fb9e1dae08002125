"""Text-guided decoder: pyramid + score map -> FPN -> semantic-FPN head -> logits at the finest level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weakclip.config import DecoderConfig
from weakclip.models.adapter import Level
from weakclip.models.resize import resize
from weakclip.runtime.compilation import region


def _conv_norm_relu(in_channels: int, channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class Lateral(nn.Conv2d):
    """1x1 convolution of a level's map, concatenated with the score map resized to it.

    Each of the two has its own columns of the weight. Those of the level are applied before its last doubling (see Doubling),
    those of the scores before the scores are resized: resizing treats all channels alike, so channels can be mixed first.
    """

    def __init__(self, in_channels: int, channels: int, align_corners: bool) -> None:
        super().__init__(in_channels, channels, kernel_size=1)
        self.align_corners = align_corners

    def forward(self, level: Level, scores_BKhw: Tensor | None) -> Tensor:  # type: ignore[override]
        """Return B x `channels` x H x W. scores_BKhw: the other input channels, if there are more than the level's."""
        assert self.bias is not None
        D = level.features_BDhw.shape[1]
        x_BOHW = level.convolved(self.weight[:, :D, 0, 0], self.bias)
        if scores_BKhw is None:
            return x_BOHW
        return x_BOHW + resize(F.conv2d(scores_BKhw, self.weight[:, D:]), x_BOHW.shape[2:], self.align_corners)


class Fpn(nn.Module):
    """1x1 lateral convs, a top-down path of nearest upsampling and addition, and 3x3 convs; no norm and no activation."""

    def __init__(self, in_channels: int, channels: int, align_corners: bool, levels: int = 4) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(Lateral(in_channels, channels, align_corners) for _ in range(levels))
        self.outputs = nn.ModuleList(nn.Conv2d(channels, channels, kernel_size=3, padding=1) for _ in range(levels))

    @region
    def forward(self, pyramid: Sequence[Level], scores_BKhw: Tensor | None) -> list[Tensor]:
        levels = [lateral(level, scores_BKhw) for lateral, level in zip(self.laterals, pyramid, strict=True)]
        for fine in range(len(levels) - 2, -1, -1):
            levels[fine] = levels[fine] + F.interpolate(levels[fine + 1], size=levels[fine].shape[2:], mode="nearest")
        return [output(x) for output, x in zip(self.outputs, levels, strict=True)]


class FpnHead(nn.Module):
    """Semantic-FPN head. Level i: max(1, i) times [conv, norm, ReLU, then x2 upsampling unless i is 0]; the levels are summed."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float, levels: int = 4) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            nn.ModuleList(_conv_norm_relu(channels if i else in_channels, channels) for i in range(max(1, level)))
            for level in range(levels)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, num_classes, kernel_size=1)

    @region
    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        total = torch.zeros((), device=pyramid[0].device)
        for level, x_BCHW in enumerate(pyramid):
            for conv in self.scales[level].children():
                x_BCHW = conv(x_BCHW)
                if level:
                    x_BCHW = resize(x_BCHW, (2 * x_BCHW.shape[2], 2 * x_BCHW.shape[3]))
            total = total + (resize(x_BCHW, pyramid[0].shape[2:]) if level else x_BCHW)
        return self.classify(self.dropout(total))


class TextGuidedDecoder(nn.Module):
    """The decoder (paper, section 3.4; released code: FPN neck and FPNHead on features with the score map concatenated)."""

    def __init__(self, width: int, num_names: int, num_classes: int, config: DecoderConfig) -> None:
        """num_names: channels of the score map. num_classes: channels of the logits."""
        super().__init__()
        self.score_map = config.score_map
        self.neck = Fpn(width + num_names * self.score_map, config.fpn_channels, config.align_corners)
        self.head = FpnHead(config.fpn_channels, config.head_channels, num_classes, config.dropout)

    def forward(self, pyramid: Sequence[Level], scores_BKhw: Tensor) -> Tensor:
        """Return logits at the finest level's resolution, B x K x 4h x 4w."""
        return self.head(self.neck(pyramid, scores_BKhw if self.score_map else None))
