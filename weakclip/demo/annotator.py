"""A small CNN that learnt from labels what pictures show, and says of a picture's labels where in it they are true.

With it, places are learnt from labels alone: by token labelling (Jiang et al., "All Tokens Matter", NeurIPS 2021), where each
patch of a transformer is trained towards what a CNN finds there. `python -m weakclip.demo.backbones --only cam_cnn` trains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from weakclip.config import ConfigError
from weakclip.demo import world
from weakclip.demo.cam import CamNetwork
from weakclip.demo.supply import Captions
from weakclip.labels import DEMO

THINGS = (*DEMO[1:], *world.CLUTTER)
NOUNS = (*THINGS, *world.GROUNDS)
LABELS = (*NOUNS, *(f"a {look} {thing}" for thing in THINGS for look in (*world.TEXTURES, *world.BODY_COLOURS)))
"""Phrases of captions. As with ImageNet's, there are things of all kinds among them, and their breeds."""


def multi_hot(captions: Sequence[Captions], labels: Sequence[str] = LABELS) -> Tensor:
    """float [B, A]: 1 where a label is among a picture's captions."""
    column = {label: number for number, label in enumerate(labels)}
    true = torch.zeros(len(captions), len(labels))
    for row, own in zip(true, captions, strict=True):
        row[[column[caption] for caption in own if caption in column]] = 1
    return true


def load(path: Path) -> CamNetwork:
    """The network in a file of `weakclip.demo.backbones`: images [B, 3, H, W] -> logits of LABELS, B x A x H/8 x W/8.

    Raises ConfigError naming a file that is missing.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; `python -m weakclip.demo.backbones --only cam_cnn` trains it")
    network = CamNetwork(len(LABELS))
    network.load_state_dict(load_file(path))
    return network.eval()
