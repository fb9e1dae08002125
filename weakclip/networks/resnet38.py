"""ResNet-38 DeepLab-LargeFOV, the network of the main tables.

Trunk: Wu et al., Wider or Deeper (arXiv 1611.10080), model A1, dilated to output stride 8 as in PSA's released code
(jiwoon-ahn/psa, network/resnet38d.py). Files of its weights use that code's parameter names.
Head: WeakCLIP's released retraining (Yingyue-L/deeplabv1-resnet38, tools/net/deeplabv1.py, from SEAM's
YudeWang/semantic-segmentation-codebase). MCTformer's head (xulianuwa/MCTformer, seg/network/resnet38_seg.py) is different: two
3x3 convolutions of dilation 12 with biases, 4096 -> 512 -> K, with only a ReLU between them.

Recipe of WeakCLIP's retraining (tools/config.py and, at commit ca92b8d, train.py): SGD, momentum 0.9, weight decay 5e-4;
learning rate VOC 1e-3, COCO 1.5e-3, times (1 - step / (steps + 1)) ^ 0.9, no warm-up; the head's convolutions 10 x; the
classifier's bias 20 x without decay; affine parameters of all BatchNorms are in no group and so never change. Batch 10 on 2
GPUs; 40,000 steps on VOC, 160,000 on COCO. Scale 0.5..1.5 (bicubic), crop 448 (padding ignored), flip 0.5, hue, saturation,
value +-10 in OpenCV's units. Cross-entropy on logits resized to the image. Test: scales 0.5 0.75 1 1.25 1.5 with flips, mean of
the logits, CRF over the classes that win at least one pixel.
Recipe of MCTformer's (VOC; seg/train_seg.py, run_seg.sh): SGD, learning rate 7e-4, head 10 x, (1 - step / steps) ^ 0.9, batch 4,
30 epochs, scale 0.7..1.3 (one for the batch), crop 321, flip 0.5; its weight decay of 1e-5 is passed to SGD in place of the
momentum, so both are almost zero. Test: the same scales, the maximum of their softmax, CRF.

Differences from WeakCLIP's retraining: it left the trunk's BatchNorm in training mode (momentum 3e-4, synchronised) until the
first evaluation in one version and throughout in another, because the code that freezes it was not reached. Here it is frozen,
as that code, PSA's and MCTformer's intend. The head's BatchNorm has PyTorch's momentum instead of 3e-4, with which evaluation is
wrong for the first thousands of steps. Logits are to be resized with align_corners=False; there it was True.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weakclip.checkpoints import state_dict
from weakclip.networks.base import OTHER_BACKBONE, Network, read_backbone


def _conv(in_channels: int, channels: int, size: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, size, stride, padding=dilation * (size // 2), dilation=dilation, bias=False)


class _Residual(nn.Module):
    """Pre-activation residual block: x (or its projection, where the shape changes) + branch(relu(norm(x)))."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(in_channels)
        same = in_channels == channels and stride == 1
        self.conv_branch1 = None if same else _conv(in_channels, channels, 1, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        active_BCHW = F.relu(self.bn_branch2a(x_BCHW))
        shortcut_BDhw = x_BCHW if self.conv_branch1 is None else self.conv_branch1(active_BCHW)
        return shortcut_BDhw + self.branch(active_BCHW)

    def branch(self, x_BCHW: Tensor) -> Tensor:
        raise NotImplementedError


class _Basic(_Residual):
    """Residual block with two 3x3 convolutions. dilations: those of the first and of the second."""

    def __init__(self, in_channels: int, middle: int, channels: int, stride: int, dilations: tuple[int, int]) -> None:
        super().__init__(in_channels, channels, stride)
        self.conv_branch2a = _conv(in_channels, middle, 3, stride, dilations[0])
        self.bn_branch2b1 = nn.BatchNorm2d(middle)
        self.conv_branch2b1 = _conv(middle, channels, 3, 1, dilations[1])

    def branch(self, x_BCHW: Tensor) -> Tensor:
        return self.conv_branch2b1(F.relu(self.bn_branch2b1(self.conv_branch2a(x_BCHW))))


class _Bottleneck(_Residual):
    """Residual block with 1x1, 3x3 (dilation 4) and 1x1 convolutions of a quarter, half and all of the channels."""

    def __init__(self, in_channels: int, channels: int, dropout: float) -> None:
        super().__init__(in_channels, channels, stride=1)
        self.conv_branch2a = _conv(in_channels, channels // 4, 1)
        self.bn_branch2b1 = nn.BatchNorm2d(channels // 4)
        self.conv_branch2b1 = _conv(channels // 4, channels // 2, 3, dilation=4)
        self.bn_branch2b2 = nn.BatchNorm2d(channels // 2)
        self.conv_branch2b2 = _conv(channels // 2, channels, 1)
        self.dropout = nn.Dropout2d(dropout)

    def branch(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.dropout(F.relu(self.bn_branch2b1(self.conv_branch2a(x_BCHW))))
        x_BCHW = self.dropout(F.relu(self.bn_branch2b2(self.conv_branch2b1(x_BCHW))))
        return self.conv_branch2b2(x_BCHW)


# Per stage: name, number of blocks, channels of the first block's first convolution and output (in widths), stride of the first
# block, and the dilation of all 3x3 convolutions except the first, whose input is from an undilated stage.
_STAGES = (("b2", 3, 2, 2, 2, 1), ("b3", 3, 4, 4, 2, 1), ("b4", 6, 8, 8, 2, 1), ("b5", 3, 8, 16, 1, 2))


class Trunk(nn.Sequential):
    """The trunk: images [B, 3, H, W] -> features [B, 64 x width, H/8, W/8] (rounded up). Its children are named as in files."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.add_module("conv1a", _conv(3, width, 3))
        channels = width
        for name, blocks, middle, out, stride, dilation in _STAGES:
            for block in range(blocks):
                first = block == 0
                dilations = (1 if first else dilation, dilation)
                layer = _Basic(channels, middle * width, out * width, stride if first else 1, dilations)
                self.add_module(name if first else f"{name}_{block}", layer)
                channels = out * width
        self.add_module("b6", _Bottleneck(channels, 32 * width, dropout=0.3))
        self.add_module("b7", _Bottleneck(32 * width, 64 * width, dropout=0.5))
        self.add_module("bn7", nn.BatchNorm2d(64 * width))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return F.relu(super().forward(images_B3HW))


class ResNet38(Network):
    """ResNet-38 with logits at stride 8, rounded up. In a pre-trained trunk, the first convolution and BatchNorms are frozen."""

    least_side = 16  # two positions per side: the head's BatchNorm cannot train on a single value

    def __init__(self, num_classes: int, width: int = 64) -> None:
        """width: channels of the first convolution; 64 is published."""
        super().__init__()
        self.pretrained = False
        self.trunk = Trunk(width)
        hidden = 8 * width
        self.head = nn.Sequential(
            _conv(64 * width, hidden, 3, dilation=12),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            _conv(hidden, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Conv2d(hidden, num_classes, 1),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.head(self.trunk(images_B3HW))

    def train(self, mode: bool = True) -> ResNet38:
        super().train(mode)
        if self.pretrained:
            for module in self._trunk_norms():
                module.eval()
        return self

    def head_parameters(self) -> list[nn.Parameter]:
        return list(self.head.parameters())

    def load_pretrained(self, path: Path) -> None:
        """Load a PyTorch conversion of ilsvrc-cls_rna-a1_cls1000_ep-0001.params, with or without classifier, into the trunk.

        Afterwards the trunk's BatchNorms keep their statistics. Raises ConfigError if the file does not fit the trunk.
        """
        found = read_backbone(path, "fc8.", "linear1000.")
        expected = self.trunk.state_dict()
        # The MXNet file has no such counters, and with a fixed momentum nothing reads them.
        counters = {name: tensor for name, tensor in expected.items() if name.endswith(".num_batches_tracked")}
        state_dict.load_into(self.trunk, counters | found, f"pretrained: {path}", OTHER_BACKBONE)
        self.pretrained = True
        for module in (self.trunk.conv1a, *self._trunk_norms()):
            module.requires_grad_(False)
        self.train(self.training)

    def _trunk_norms(self) -> list[nn.Module]:
        return [module for module in self.trunk.modules() if isinstance(module, _BatchNorm)]  # synchronised ones, too
