"""What ImageNet is to real networks, for those of the synthetic world: backbones trained on the labels of other pictures.

A few hundred pseudo masks teach a network with a random start next to nothing; real ones begin from a backbone that knows
shapes and textures. Here each learns, from labels alone, what a picture shows and which texture and colour it has: ImageNet's
labels, too, name things of all kinds, and their breeds. The files are in the formats of the libraries whose networks they are,
so `retrain.pretrained` and `classify.pretrained` read them like any other.

    python -m weakclip.demo.backbones --out runs/demo-backbones
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from weakclip import cli
from weakclip.demo import supply, world
from weakclip.demo.supply import Captions, Pool
from weakclip.labels import DEMO
from weakclip.networks import NETWORKS
from weakclip.networks.resnet38 import Trunk
from weakclip.torchvision_ops import declare_missing

declare_missing()

import timm
from transformers import SegformerConfig, SegformerForImageClassification

THINGS = (*DEMO[1:], *world.CLUTTER)
LABELS = (*THINGS, *world.GROUNDS, *(f"a {look} {thing}" for thing in THINGS for look in (*world.TEXTURES, *world.BODY_COLOURS)))
PEAK_LR = 1e-3
PRIOR = -3.0  # what the bias of a label begins with: most are false of a picture


class Backbone(NamedTuple):
    """A classifier of LABELS with the names of its library's file. Images [B, 3, H, W] -> logits [B, len(LABELS)]."""

    network: nn.Module
    logits: Callable[[Tensor], Tensor]
    write: Callable[[Path], None]
    """Its model.safetensors, and what the library puts beside it, into a folder."""


def deit_tiny() -> Backbone:
    """timm's, with the mean of the patches in the place of the class token's output, so that patches learn what they show."""
    network = timm.create_model(
        "deit_tiny_patch16_224",
        num_classes=len(LABELS),
        img_size=192,
        dynamic_img_size=True,
        global_pool="avg",
        fc_norm=False,  # norm stays in its place before the mean, under DeiT's name
    )
    nn.init.constant_(network.head.bias, PRIOR)
    return Backbone(network, network, lambda folder: _write(network, folder))


def mit_b0() -> Backbone:
    """transformers' Mix Transformer, its sizes the library's defaults."""
    network = SegformerForImageClassification(SegformerConfig(num_labels=len(LABELS)))
    nn.init.constant_(network.classifier.bias, PRIOR)
    return Backbone(network, lambda images_B3HW: network(images_B3HW).logits, network.save_pretrained)


def resnet38_narrow() -> Backbone:
    """Its trunk and a linear layer with the name that it has in the released file."""
    width = NETWORKS["resnet38"].backbones["narrow"]["width"]
    trunk, fc8 = Trunk(width), nn.Linear(64 * width, len(LABELS))
    nn.init.constant_(fc8.bias, PRIOR)
    network = nn.ModuleDict({**dict(trunk.named_children()), "fc8": fc8})
    return Backbone(network, lambda images_B3HW: fc8(trunk(images_B3HW).mean((2, 3))), lambda folder: _write(network, folder))


BACKBONES: dict[str, Callable[[], Backbone]] = {"deit_tiny": deit_tiny, "mit_b0": mit_b0, "resnet38_narrow": resnet38_narrow}


def _write(network: nn.Module, folder: Path) -> None:
    save_file(network.state_dict(), folder / "model.safetensors")


def multi_hot(captions: Sequence[Captions]) -> Tensor:
    """float [B, len(LABELS)]: 1 where a label is among a picture's captions."""
    column = {label: number for number, label in enumerate(LABELS)}
    true = torch.zeros(len(captions), len(LABELS))
    for row, own in zip(true, captions, strict=True):
        row[[column[caption] for caption in own if caption in column]] = 1
    return true


def train(backbone: Backbone, name: str, steps: int, seed: int) -> None:
    """Train on the pictures of other worlds: first on close-ups of half the side, the last 40 % on whole pictures."""
    parameters = list(backbone.network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps, pct_start=0.05)
    rng, series = np.random.default_rng(seed), supply.BACKBONE_SEED + 1000 * seed
    with supply.drawing_process() as worker:
        close_ups, whole = Pool(worker, series, 96, True, fresh=8), Pool(worker, series, 192, False, fresh=4)
        for step in (bar := tqdm(range(steps), name, unit="step", disable=None)):
            images, captions = close_ups.take(32, rng) if step < 0.6 * steps else whole.take(12, rng)
            logits_BA, true_BA = backbone.logits(supply.network_input(images)), multi_hot(captions)
            loss = F.binary_cross_entropy_with_logits(logits_BA, true_BA, reduction="sum") / len(images)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Train backbones for the synthetic world's networks, on labels of other pictures."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for a folder each")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    options = parser.parse_args(arguments)
    for name in options.only:
        torch.manual_seed(options.seed)
        backbone = BACKBONES[name]()
        train(backbone, name, options.steps, options.seed)
        folder = options.out / name
        folder.mkdir(parents=True, exist_ok=True)
        backbone.write(folder)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
