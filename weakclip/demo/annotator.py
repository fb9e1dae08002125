"""A small CNN trained on image labels, which locates the labels of an image.

With it the small CLIP learns locations from labels, by token labelling (Jiang et al., "All Tokens Matter", NeurIPS 2021): each
patch of a transformer is trained towards the CNN's prediction there.

    python -m weakclip.demo.annotator --out runs/demo-annotator.safetensors
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weakclip import cli
from weakclip.config import ConfigError
from weakclip.demo import world
from weakclip.demo.image_pool import Captions
from weakclip.demo.pretraining import pretrain
from weakclip.labels import DEMO
from weakclip.runtime.command_line import output_file

THINGS = (*DEMO[1:], *world.CLUTTER)
NOUNS = (*THINGS, *world.GROUNDS)
LABELS = (*NOUNS, *(f"a {look} {thing}" for thing in THINGS for look in (*world.TEXTURES, *world.BODY_COLOURS)))
"""Phrases of captions. As in ImageNet, they include things of all kinds, and their breeds."""

PRIOR = -3.0  # initial bias of a label, since most labels are false of an image


class Annotator(nn.Module):
    """A CNN of stride 8. The mean of its last map is the logit of each label for the image."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, stride in ((32, 2), (64, 2), (128, 2), (128, 1), (128, 1)):
            conv = nn.Conv2d(channels, width, kernel_size=3, stride=stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classify = nn.Conv2d(channels, len(LABELS), kernel_size=1)
        nn.init.constant_(self.classify.bias, PRIOR)  # type: ignore[arg-type]

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """Return logits of LABELS at each location, B x A x H/8 x W/8."""
        return self.classify(self.features(x_B3HW))


def multi_hot(captions: Sequence[Captions], labels: Sequence[str] = LABELS) -> Tensor:
    """Return float [B, A], 1 where a label is among an image's captions."""
    column = {label: number for number, label in enumerate(labels)}
    true = torch.zeros(len(captions), len(labels))
    for row, own in zip(true, captions, strict=True):
        row[[column[caption] for caption in own if caption in column]] = 1
    return true


def load(path: Path) -> Annotator:
    """Load the annotator from a file that this module wrote.

    Raises ConfigError naming a file that is missing.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; train it with: python -m weakclip.demo.annotator --out {path}")
    network = Annotator()
    network.load_state_dict(load_file(path))
    return network.eval()


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(description="Train a small CNN on image labels of the synthetic world.")
    parser.add_argument("--out", type=output_file, required=True, metavar="FILE")
    parser.add_argument("--steps", type=int, default=2500)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    network = Annotator()

    def loss_of(x_B3HW: Tensor, captions: Sequence[Captions]) -> Tensor:
        """Return the binary cross-entropy, summed over labels and averaged over images."""
        logits_BA, true_BA = network(x_B3HW).mean((2, 3)), multi_hot(captions)
        return F.binary_cross_entropy_with_logits(logits_BA, true_BA, reduction="sum") / len(true_BA)

    options.out.parent.mkdir(parents=True, exist_ok=True)
    pretrain("annotator", {"network": network}, loss_of, options.steps, 0.6, options.out.with_suffix(".training.pt"))
    save_file(network.state_dict(), options.out)


if __name__ == "__main__":
    cli.run(main)
