"""The ordinary segmentation networks that are retrained on pseudo masks."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from weakclip.config import ConfigError
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


_DEITS = [f"deit_{size}{distilled}_patch16_224" for distilled in ("", "_distilled") for size in ("tiny", "small", "base")]
NETWORKS = {
    "resnet38": Entry("resnet38", "ResNet38", "wide", {"wide": {"width": 64}, "narrow": {"width": 16}}),
    "segmenter": Entry("segmenter", "Segmenter", "deit_small_patch16_224", {name: {"backbone": name} for name in _DEITS}),
    "segformer": Entry("segformer", "SegFormer", "b2", {f"b{size}": {"backbone": f"b{size}"} for size in range(6)}),
}


def build(name: str, num_classes: int, backbone: str | None, pretrained: str | None) -> Network:
    """The network of that name in NETWORKS, for `num_classes` classes with the background.

    backbone: one of its backbones; None: the published one.
    pretrained: the file, or Hugging Face's directory, of the backbone's ImageNet weights; None: random initialisation.
    Raises ConfigError for another name, and as `Network.load_pretrained` does.
    """
    if name not in NETWORKS:
        raise ConfigError(f"network: {name!r} is none of {', '.join(NETWORKS)}")
    entry = NETWORKS[name]
    if backbone is not None and backbone not in entry.backbones:
        raise ConfigError(f"backbone: {backbone!r} is none of {name}'s: {', '.join(entry.backbones)}")
    module = import_module(f"{__name__}.{entry.module}")
    network = getattr(module, entry.network)(num_classes, **entry.backbones[backbone or entry.published])
    if pretrained is not None:
        network.load_pretrained(Path(pretrained))
    return network
