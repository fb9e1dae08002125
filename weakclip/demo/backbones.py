"""What ImageNet is to real networks, for those of the synthetic world: backbones trained on the labels of other pictures.

A few hundred pseudo masks teach a network with a random start next to nothing; real ones begin from a backbone that knows
shapes and textures. Here each learns, from labels alone, what a picture shows and which texture and colour it has: ImageNet's
labels, too, name things of all kinds, and their breeds. The first, a small CNN, learns that fastest, and then says of the
pictures' labels where they are true while the others learn. The files are in the formats of the libraries whose networks they
are, so `retrain.pretrained` and `classify.pretrained` read them like any other.

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
from weakclip.demo import supply
from weakclip.demo.annotator import LABELS, Annotator, load, multi_hot
from weakclip.demo.beginning import SelfAttention, begin_near
from weakclip.demo.state import State
from weakclip.demo.supply import Pool
from weakclip.networks import NETWORKS
from weakclip.networks.resnet38 import Trunk
from weakclip.torchvision_ops import declare_missing

declare_missing()

import timm
from transformers import SegformerConfig, SegformerForImageClassification

PEAK_LR = 1e-3
PRIOR = -3.0  # what the bias of a label begins with: most are false of a picture


class Backbone(NamedTuple):
    """A classifier of LABELS with the names of its library's file."""

    network: nn.Module
    maps: Callable[[Tensor], Tensor]
    """Images [B, 3, H, W] -> logits at each place of the last map, [B, A, h, w]; the picture's are their mean."""
    write: Callable[[Path], None]
    """Its model.safetensors, and what the library puts beside it, into a folder."""


def small_cnn() -> Backbone:
    """The annotator of the others, and of the small CLIP."""
    network = Annotator()
    nn.init.constant_(network.classify.bias, PRIOR)  # type: ignore[arg-type]
    return Backbone(network, network, lambda folder: _write(network, folder))


def deit_tiny() -> Backbone:
    """timm's, with its classifier on the patches instead of the class token."""
    network = timm.create_model("deit_tiny_patch16_224", num_classes=len(LABELS), img_size=192, dynamic_img_size=True)
    attentions = [SelfAttention(b.attn.qkv.weight, b.attn.proj.weight, b.attn.num_heads) for b in network.blocks]
    begin_near(attentions, network.pos_embed[0, network.num_prefix_tokens :])
    nn.init.constant_(network.head.bias, PRIOR)

    def maps(images_B3HW: Tensor) -> Tensor:
        logits_BLA = network.head(network.forward_features(images_B3HW)[:, network.num_prefix_tokens :])
        return logits_BLA.mT.unflatten(2, (images_B3HW.shape[2] // 16, images_B3HW.shape[3] // 16))

    return Backbone(network, maps, lambda folder: _write(network, folder))


def mit_b0() -> Backbone:
    """transformers' Mix Transformer, its sizes the library's defaults."""
    network = SegformerForImageClassification(SegformerConfig(num_labels=len(LABELS)))
    nn.init.constant_(network.classifier.bias, PRIOR)

    def maps(images_B3HW: Tensor) -> Tensor:
        return network.classifier(network.segformer(images_B3HW).last_hidden_state.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return Backbone(network, maps, network.save_pretrained)


def resnet38_narrow() -> Backbone:
    """Its trunk and a linear layer with the name that it has in the released file."""
    width = NETWORKS["resnet38"].backbones["narrow"]["width"]
    trunk, fc8 = Trunk(width), nn.Conv2d(64 * width, len(LABELS), 1)
    nn.init.constant_(fc8.bias, PRIOR)  # type: ignore[arg-type]
    network = nn.ModuleDict({**dict(trunk.named_children()), "fc8": fc8})
    return Backbone(network, lambda images_B3HW: fc8(trunk(images_B3HW)), lambda folder: _write(network, folder))


BACKBONES: dict[str, Callable[[], Backbone]] = {
    "annotator": small_cnn,
    "deit_tiny": deit_tiny,
    "mit_b0": mit_b0,
    "resnet38_narrow": resnet38_narrow,
}
ANNOTATOR = "annotator"
"""The first, since the others learn from it."""


def _write(network: nn.Module, folder: Path) -> None:
    save_file(network.state_dict(), folder / "model.safetensors")


def train(backbone: Backbone, name: str, steps: int, seed: int, annotator: nn.Module | None, state: Path) -> None:
    """Train on the pictures of other worlds: first on close-ups of half the side, the last 40 % on whole pictures.

    annotator: gives the labels of a picture to places in it (token labelling, Jiang et al., NeurIPS 2021); None: no places.
    state: file from which an interrupted training goes on.
    """
    parameters = list(backbone.network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps, pct_start=0.05)
    kept = State(state, {"network": backbone.network, "optimizer": optimizer, "schedule": schedule})
    first = int(kept.restore().get("step", 0))
    rng, series = np.random.default_rng((seed, first)), supply.BACKBONE_SEED + 100_000 * seed + first
    with supply.drawing_process() as worker:
        close_ups, whole = Pool(worker, series, 96, True, fresh=4), Pool(worker, series, 192, False, fresh=2)
        for step in (bar := tqdm(range(first, steps), name, steps, initial=first, unit="step", disable=None)):
            images, captions = close_ups.take(16, rng) if step < 0.6 * steps else whole.take(8, rng)
            x_B3HW, true_BA = supply.network_input(images), multi_hot(captions)
            maps_BAhw = backbone.maps(x_B3HW)
            loss = _error(maps_BAhw.mean((2, 3)), true_BA)
            if annotator is not None:
                loss = loss + _error(maps_BAhw, _places(annotator, x_B3HW, true_BA, maps_BAhw.shape[2:]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            kept.save(step=step + 1)
    kept.remove()


def _error(logits: Tensor, true: Tensor) -> Tensor:
    """Binary cross-entropy: the sum over labels (dimension 1), the mean over all else."""
    return F.binary_cross_entropy_with_logits(logits, true, reduction="sum") * logits.shape[1] / logits.numel()


@torch.no_grad()
def _places(annotator: nn.Module, x_B3HW: Tensor, true_BA: Tensor, size: Sequence[int]) -> Tensor:
    """How far each of a picture's labels is true of each place, [B, A, h, w]."""
    found_BAhw = annotator(x_B3HW).sigmoid() * true_BA[:, :, None, None]
    return F.interpolate(found_BAhw, size=tuple(size), mode="bilinear", align_corners=False)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Train backbones for the synthetic world's networks, on labels of other pictures."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for a folder each")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    options = parser.parse_args(arguments)
    for name in options.only:
        folder = options.out / name
        if (folder / "model.safetensors").is_file():
            print(f"{folder} is there")
            continue
        torch.manual_seed(options.seed)
        backbone = BACKBONES[name]()
        annotator = None if name == ANNOTATOR else load(options.out / ANNOTATOR / "model.safetensors")
        folder.mkdir(parents=True, exist_ok=True)
        train(backbone, name, options.steps, options.seed, annotator, folder / "training.pt")
        backbone.write(folder)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
