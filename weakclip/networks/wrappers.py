"""Wrappers that give the networks other than WeakCLIP the interface of the training loop."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from weakclip import registry
from weakclip.config import Config
from weakclip.data.photometric import IMAGENET
from weakclip.labels import IGNORE
from weakclip.masks.sliding_window import Predictor
from weakclip.models.interface import Group, Targets, Trained
from weakclip.models.precision import autocast
from weakclip.models.resize import resize
from weakclip.networks import mctformer
from weakclip.networks.base import Network
from weakclip.registry import NETWORKS


def build_segmentation(config: Config, num_classes: int, pretrained: bool) -> Segmentation:
    """Return the network that `config.retrain` names, with random weights, or with `pretrained` those of the recipe's file.

    Raises ConfigError if the file does not fit.
    """
    ours = config.retrain
    entry = NETWORKS[str(ours.network)]
    sides = {"image_size": ours.augment.crop} if entry.sized else {}
    network: Network = registry.load(entry.network)(num_classes, **entry.backbones[ours.backbone or entry.published], **sides)
    if pretrained and ours.pretrained is not None:
        network.load_pretrained(Path(ours.pretrained))
    return Segmentation(network, num_classes, ours.head_lr, config.precision)


def build_classification(config: Config, num_classes: int, pretrained: bool) -> Classification:
    """Return the MCTformer of `config.classify`, with random weights, or with `pretrained` those of the recipe's file.

    Raises ConfigError if the backbone is unknown or the file does not fit.
    """
    ours = config.classify
    network = mctformer.MCTformer(num_classes, ours.backbone, ours.augment.crop, ours.drop_path)
    if pretrained and ours.pretrained is not None:
        network.load_pretrained(Path(ours.pretrained))
    return Classification(network, ours.head_lr, config.precision)


class Segmentation(Trained):
    """A network of weakclip.networks in supervised training: cross-entropy at the image's size."""

    def __init__(self, network: Network, num_classes: int, head_lr: float, precision: str) -> None:
        super().__init__()
        self.network, self.num_classes, self.head_lr, self.precision = network, num_classes, head_lr, precision
        self.normalisation = network.normalisation

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Return the logits, B x K x h x w, of normalised images."""
        with autocast(self.precision, images_B3HW.device):
            return self.network(images_B3HW)

    def losses(self, logits_BKhw: Tensor, targets: Targets) -> dict[str, Tensor]:
        logits_BKHW = resize(logits_BKhw.float(), targets.seeds_BHW.shape[1:])
        total = F.cross_entropy(logits_BKHW, targets.seeds_BHW, ignore_index=IGNORE, reduction="sum")
        return {"segmentation": total / (targets.seeds_BHW != IGNORE).sum().clamp(min=1)}

    def groups(self) -> list[Group]:
        return _apart(self, self.network.head_parameters(), self.head_lr)

    def predictor(self) -> Predictor:
        device = next(self.parameters()).device
        return Predictor(self, self.num_classes, self.normalisation, self.network.least_side, device)


class Classification(Trained):
    """MCTformer in training on image labels."""

    def __init__(self, network: mctformer.MCTformer, head_lr: float, precision: str) -> None:
        super().__init__()
        self.network, self.head_lr, self.precision, self.normalisation = network, head_lr, precision, IMAGENET

    def forward(self, images_B3HW: Tensor) -> mctformer.Logits:
        with autocast(self.precision, images_B3HW.device):
            return self.network(images_B3HW)

    def losses(self, logits: mctformer.Logits, targets: Targets) -> dict[str, Tensor]:
        return mctformer.losses(logits, targets.labels_BK[:, 1:].float())

    def groups(self) -> list[Group]:
        return _apart(self, self.network.head_parameters(), self.head_lr)


def _apart(model: Trained, head: list[nn.Parameter], head_lr: float) -> list[Group]:
    """Return two groups: the parameters outside the head, and those of the head, which learn `head_lr` times as fast."""
    apart = {id(parameter) for parameter in head}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    return [Group(rest, 1.0), Group(head, head_lr)]
