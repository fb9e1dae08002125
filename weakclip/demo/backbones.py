"""Pretrained backbones for the networks of the synthetic world, as ImageNet backbones are for real networks.

A randomly initialized network learns next to nothing from a few hundred pseudo masks, so networks start from a backbone that
knows shapes and textures. Here that knowledge comes from the small CLIP. The ViT is initialized with its image tower, as timm's
CLIP ViTs are. The others are trained on images of other worlds to predict its tokens at each location (feature distillation: Wei
et al., "Contrastive Learning Rivals Masked Image Modeling in Fine-tuning via Feature Distillation", 2022). No masks are used.
The files have the formats of the networks' libraries, so `retrain.pretrained` and `classify.pretrained` read them like any
others.

    python -m weakclip.demo.backbones --out runs/demo-backbones
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from weakclip import cli
from weakclip.config import ClipConfig
from weakclip.demo import world
from weakclip.demo.clip import encode_patches
from weakclip.demo.image_pool import BACKBONE_SEED, Captions, network_input
from weakclip.demo.pretraining import pretrain
from weakclip.models.clip import load_clip
from weakclip.networks.resnet38 import Trunk
from weakclip.registry import NETWORKS
from weakclip.runtime.torchvision_ops import declare_missing

declare_missing()

import timm
from transformers import SegformerConfig, SegformerForImageClassification

_log = logging.getLogger(__name__)


class Backbone(NamedTuple):
    """A network with the parameter names of its library's file."""

    network: nn.Module
    maps: Callable[[Tensor], list[Tensor]]
    """Images, B x 3 x H x W -> the maps that a segmentation network reads, B x C x h x w each."""
    write: Callable[[Path], None]
    """Writes its model.safetensors, and the library's other files, into a folder."""


def small_clip() -> Any:
    """Load the small CLIP of the package, frozen and in eval mode."""
    return load_clip(ClipConfig(None, "demo", double_class_embedding=False)).eval().requires_grad_(False)


def deit_tiny() -> Backbone:
    """Build timm's DeiT-Ti of twelve blocks: the last six are the small CLIP's, the first six are initialized to add nothing."""
    network = timm.create_model("deit_tiny_patch16_224", num_classes=0, img_size=192, dynamic_img_size=True)
    _begin_as(network, small_clip().visual)

    def maps(images_B3HW: Tensor) -> list[Tensor]:
        tokens_BLC = network.forward_features(images_B3HW)[:, network.num_prefix_tokens :]
        return [tokens_BLC.mT.unflatten(2, (images_B3HW.shape[2] // 16, images_B3HW.shape[3] // 16))]

    return Backbone(network, maps, lambda folder: _write(network, folder))


def mit_b0() -> Backbone:
    """Build transformers' Mix Transformer with the library's default sizes. Its classifier stays random."""
    network = SegformerForImageClassification(SegformerConfig())

    def maps(images_B3HW: Tensor) -> list[Tensor]:
        return list(network.segformer(images_B3HW, output_hidden_states=True).hidden_states)

    return Backbone(network, maps, network.save_pretrained)


def resnet38_narrow() -> Backbone:
    """Build the trunk of the narrow ResNet-38."""
    network = Trunk(NETWORKS["resnet38"].backbones["narrow"]["width"])
    return Backbone(network, lambda images_B3HW: [network(images_B3HW)], lambda folder: _write(network, folder))


BACKBONES: dict[str, Callable[[], Backbone]] = {"deit_tiny": deit_tiny, "mit_b0": mit_b0, "resnet38_narrow": resnet38_narrow}
STEPS = {"mit_b0": 5000, "resnet38_narrow": 1500}
"""Training steps for the distillation. The ViT needs none, since it has CLIP's weights already."""


def _write(network: nn.Module, folder: Path) -> None:
    save_file(network.state_dict(), folder / "model.safetensors")


@torch.no_grad()
def _begin_as(vit: Any, tower: Any) -> None:
    """Give a ViT the weights of CLIP's image tower, which has half as many blocks.

    Unlike the tower, the ViT has no norm before its blocks. Instead its tokens are scaled by their mean std.
    """
    images = np.stack([world.picture(BACKBONE_SEED, index).image for index in range(16)])
    positions_TC, norm = tower.positional_embedding, tower.ln_pre
    tokens_BLC = tower.conv1(network_input(images)).flatten(2).mT + positions_TC[1:]
    scale_C = norm.weight / tokens_BLC.std(2).mean()
    vit.patch_embed.proj.weight.copy_(tower.conv1.weight * scale_C[:, None, None, None])
    vit.patch_embed.proj.bias.copy_(norm.bias - tokens_BLC.mean() * scale_C)
    vit.cls_token.copy_(norm(tower.class_embedding + positions_TC[0]))
    vit.pos_embed.copy_(torch.cat([torch.zeros_like(positions_TC[:1]), positions_TC[1:] * scale_C]))
    known = {"norm1": "ln_1", "attn.qkv": "attn.in_proj_", "attn.proj": "attn.out_proj", "norm2": "ln_2"}
    known |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    blocks = tower.transformer.resblocks
    more = len(vit.blocks) - len(blocks)
    for block, other in zip(vit.blocks[more:], blocks, strict=True):
        theirs = other.state_dict()
        for ours, name in known.items():
            own = {kind: theirs[f"{name}{kind}" if name.endswith("_") else f"{name}.{kind}"] for kind in ("weight", "bias")}
            block.get_submodule(ours).load_state_dict(own)
    for block in vit.blocks[:more]:
        for last in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    vit.norm.load_state_dict(tower.ln_post.state_dict())


@torch.no_grad()
def last_tokens(clip: Any, x_B3HW: Tensor) -> Tensor:
    """Return CLIP's patch tokens after the last norm, B x C x H/16 x W/16."""
    tokens_BLC = clip.visual.ln_post(encode_patches(clip, x_B3HW)[2][-1])
    return tokens_BLC.mT.unflatten(2, (x_B3HW.shape[2] // 16, x_B3HW.shape[3] // 16))


def train(name: str, backbone: Backbone, steps: int, state: Path) -> None:
    """Train a backbone so that a linear layer on its maps predicts CLIP's tokens. state: as in `pretrain`."""
    clip = small_clip()
    with torch.no_grad():
        example = torch.zeros(1, 3, 192, 192)
        channels = sum(found.shape[1] for found in backbone.maps(example))
        reading = nn.Conv2d(channels, last_tokens(clip, example).shape[1], 1)

    def loss_of(x_B3HW: Tensor, _captions: Sequence[Captions]) -> Tensor:
        # Each channel is normalised over the batch, so that none dominates the loss.
        wanted_BChw = F.batch_norm(last_tokens(clip, x_B3HW), None, None, training=True)
        maps = [_resize(found, wanted_BChw.shape[2:]) for found in backbone.maps(x_B3HW)]
        return F.mse_loss(reading(torch.cat(maps, dim=1)), wanted_BChw)

    pretrain(name, {"network": backbone.network, "reading": reading}, loss_of, steps, 0.6, state)


def _resize(maps_BCHW: Tensor, size: Sequence[int]) -> Tensor:
    if maps_BCHW.shape[2] > size[0]:
        return F.adaptive_avg_pool2d(maps_BCHW, (size[0], size[1]))
    return F.interpolate(maps_BCHW, size=tuple(size), mode="bilinear", align_corners=False)


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(description="Train backbones for the synthetic world's networks, on other images.")
    parser.add_argument("--out", type=Path, required=True, help="folder for one folder per backbone")
    parser.add_argument("--steps", type=int, help="training steps (default: those of each backbone)")
    parser.add_argument("--only", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    options = parser.parse_args(arguments)
    for name in options.only:
        folder = options.out / name
        if (folder / "model.safetensors").is_file():
            _log.info("%s exists, skipped", folder)
            continue
        torch.manual_seed(0)
        backbone = BACKBONES[name]()
        folder.mkdir(parents=True, exist_ok=True)
        if name in STEPS:
            train(name, backbone, options.steps or STEPS[name], folder / "training.pt")
        backbone.write(folder)


if __name__ == "__main__":
    cli.run(main)
