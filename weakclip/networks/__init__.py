"""The ordinary segmentation networks that are retrained on pseudo masks."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

from weakclip.config import ConfigError, RetrainConfig
from weakclip.networks.base import Network


class Entry(NamedTuple):
    """Where a network is and what it can be built on."""

    module: str
    """Imported when the network is built, so that only the library in use is loaded."""
    network: str
    """The class in it."""
    published: str
    """The backbone of the paper's tables."""
    backbones: Mapping[str, Mapping[str, Any]]
    """Name -> the arguments of the class."""
    sized: bool = False
    """It has a position embedding, of the training's crops: its argument `image_size`."""


_DEITS = [f"deit_{size}{distilled}_patch16_224" for distilled in ("", "_distilled") for size in ("tiny", "small", "base")]
NETWORKS = {
    "resnet38": Entry("resnet38", "ResNet38", "wide", {"wide": {"width": 64}, "narrow": {"width": 8}}),
    "segmenter": Entry("segmenter", "Segmenter", "deit_small_patch16_224", {name: {"backbone": name} for name in _DEITS}, True),
    "segformer": Entry("segformer", "SegFormer", "b2", {f"b{size}": {"backbone": f"b{size}"} for size in range(6)}),
}


def build(config: RetrainConfig, num_classes: int) -> Network:
    """The network that the config names, random, for `num_classes` classes with the background.

    Raises ConfigError naming a backbone that it has not.
    """
    entry = NETWORKS[str(config.network)]
    backbone = config.backbone or entry.published
    if backbone not in entry.backbones:
        raise ConfigError(f"retrain.backbone: {backbone!r} is none of {config.network}'s: {', '.join(entry.backbones)}")
    module = import_module(f"{__name__}.{entry.module}")
    sides = {"image_size": config.augment.crop} if entry.sized else {}
    return getattr(module, entry.network)(num_classes, **entry.backbones[backbone], **sides)
