"""Class activation maps (Zhou et al., 2016) for the demo world, from a small network that sees image-level labels only.

Like real ones it begins from labels of other pictures: its convolutions ship with the package, trained by
`python -m weakclip.demo.backbones --only cam_cnn` (1,000 steps).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from weakclip.data.shard import Cam
from weakclip.data.transforms import IMAGENET, resize_image

PRETRAINED = Path(__file__).parents[1] / "assets" / "demo_cnn.safetensors"


class CamNetwork(nn.Module):
    """A CNN of stride 8 whose last map is averaged into class scores."""

    def __init__(self, num_foreground: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, stride in ((32, 2), (64, 2), (128, 2), (128, 1), (128, 1)):
            conv = nn.Conv2d(channels, width, kernel_size=3, stride=stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classify = nn.Conv2d(channels, num_foreground, kernel_size=1)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """Class maps, B x (K - 1) x H/8 x W/8."""
        return self.classify(self.features(x_B3HW))


def train_network(images_N3HW: Tensor, labels_NF: Tensor, steps: int, seed: int, batch: int = 16) -> CamNetwork:
    """A network trained on 8-bit images and multi-hot labels of the F foreground classes, with flips and random crops."""
    torch.manual_seed(seed)
    network = CamNetwork(labels_NF.shape[1])
    network.features.load_state_dict({name: tensor.float() for name, tensor in load_file(PRETRAINED).items()})
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(steps), "CAM network", unit="step", disable=None)
    for _ in bar:
        chosen = torch.randint(len(images_N3HW), (batch,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(
            network(_augment(images_N3HW[chosen], generator)).mean((2, 3)), labels_NF[chosen]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return network.eval()


def _augment(images_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    """One flip and one crop of 80-100 % of the side for the batch: nearly every object, and so its label, stays in it."""
    side = images_B3HW.shape[-1]
    crop = int(side * (0.8 + 0.2 * torch.rand((), generator=generator).item()))
    top, left = (int(torch.randint(side - crop + 1, (), generator=generator)) for _ in range(2))
    x_B3hw = IMAGENET.apply(images_B3HW[..., top : top + crop, left : left + crop].float())
    return x_B3hw.flip(3) if torch.rand((), generator=generator) < 0.5 else x_B3hw


@torch.inference_mode()
def activation_maps(network: CamNetwork, image_3HW: Tensor, classes: Sequence[int]) -> Cam:
    """Maps of the classes present (indices 1..K-1), each divided by its maximum, at a quarter of the image's side."""
    x_13HW = IMAGENET.apply(image_3HW[None].float())
    maps_Khw = (network(x_13HW) + network(x_13HW.flip(3)).flip(3))[0].relu()
    quarter = image_3HW.shape[1] // 4, image_3HW.shape[2] // 4
    maps = []
    for index in classes:
        map_hw = resize_image(maps_Khw[index - 1].numpy(), quarter)
        maps.append(np.round(255 * map_hw / max(float(map_hw.max()), 1e-6)).astype(np.uint8))
    return Cam(tuple(classes), np.stack(maps), 0.25)
