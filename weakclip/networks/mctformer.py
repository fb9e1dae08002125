"""MCTformer-V2: a ViT with one class token per class, trained on image labels, and the CAMs that its attention gives.

The method is that of Xu et al., "Multi-class Token Transformer for Weakly Supervised Semantic Segmentation" (CVPR 2022). The
constants and the order of steps are those of the released code (github.com/xulianuwa/MCTformer: models.py, engine.py).
Parameters have the released code's names; its last norm, which neither head reads, is left out. With the same weights, the
scores, maps and affinity equal those of the released code to 3e-6 of their maximum.

B images of H x W pixels, h x w token grid, L = h w patches, C = K - 1 foreground classes, T = C + L tokens, D width, n classes
of one image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weakclip.checkpoints import state_dict, weight_files
from weakclip.config import ConfigError, require_whole_patches
from weakclip.data.transforms import Size
from weakclip.models.attention import attention_weights
from weakclip.models.positions import has_square_grid, resize_positions
from weakclip.runtime.torchvision_ops import declare_missing

declare_missing()

import timm
from timm.models.vision_transformer import Block, VisionTransformer

# Parameters of a plain ViT outside its blocks, and in a block's attention.
_OUTSIDE = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
_OFFSET = 0.1  # for resizing the position embedding, as in the released code
_ATTENTION = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}


class Logits(NamedTuple):
    """Logits of the foreground classes."""

    class_BC: Tensor
    """From the class tokens."""
    patch_BC: Tensor
    """From the patch tokens."""


class Activations(NamedTuple):
    """Activation maps of the foreground classes, on the token grid."""

    maps_BChw: Tensor
    """Class-to-patch attention times the patch head's logits, >= 0; the range is not fixed."""
    affinity_BLL: Tensor
    """How much patch l (row) attends to each patch, summed over all blocks."""


class MCTformer(nn.Module):
    """timm's ViT `backbone` with a class token for each of the K - 1 foreground classes, and a head on its patches.

    num_classes: K, including background. image_size: side of the square images for which the position embedding is made; for
    other sizes it is resampled. drop_path: stochastic-depth rate of the last block during training, linear from 0 in the first.
    The weights are random; see `load_pretrained`.
    Raises ConfigError if timm has no such backbone, it is not a plain ViT, or image_size is not a multiple of its patch.
    """

    def __init__(
        self, num_classes: int, backbone: str = "deit_small_patch16_224", image_size: int = 224, drop_path: float = 0.1
    ) -> None:
        super().__init__()
        vit = _plain_vit(backbone, image_size, drop_path)
        C, D = num_classes - 1, vit.embed_dim
        self.patch = int(vit.patch_embed.patch_size[0])
        self.grid = image_size // self.patch
        self.patch_embed, self.blocks = vit.patch_embed, vit.blocks
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, C, D), std=0.02))
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, C + self.grid**2, D), std=0.02))
        self.head = nn.Conv2d(D, C, 3, padding=1)

    def forward(self, images_B3HW: Tensor) -> Logits:
        """Return the logits of ImageNet-normalised images whose sides are multiples of the patch (`forward` in models.py)."""
        x_BTD, grid = self.embed(images_B3HW)
        x_BTD = self.blocks(x_BTD)
        return Logits(x_BTD[:, : len(self.cls_token[0])].mean(2), self._find(x_BTD, grid).mean((2, 3)))

    def embed(self, images_B3HW: Tensor) -> tuple[Tensor, Size]:
        """Return the tokens that enter the first block, B x T x D, classes before patches, and the grid of the patches."""
        patches_BhwD = self.patch_embed(images_B3HW)
        B, h, w, _ = patches_BhwD.shape
        C = len(self.cls_token[0])
        positions_1TD = torch.cat(
            [self.pos_embed[:, :C], resize_positions(self.pos_embed[0, C:], (h, w), 0, "bicubic", _OFFSET)[None]], 1
        )
        return torch.cat([self.cls_token.expand(B, -1, -1), patches_BhwD.flatten(1, 2)], 1) + positions_1TD, (h, w)

    def _find(self, x_BTD: Tensor, grid: Size) -> Tensor:
        """Return the head's logits of each class in the patches after the last block, B x C x h x w."""
        return self.head(x_BTD[:, len(self.cls_token[0]) :].mT.unflatten(2, grid))

    @torch.no_grad()
    def maps(self, images_B3HW: Tensor, attention_blocks: int) -> Activations:
        """Return the maps of normalised images, and the affinity that refines them (`forward` in models.py).

        attention_blocks: number of last blocks that give the class-to-patch attention, all if there are fewer. It is averaged
        over heads and summed over these blocks. The network must be in eval mode.
        """
        assert not self.training, "maps need eval mode: in training mode, blocks may be dropped"
        x_BTD, grid = self.embed(images_B3HW)
        C, first = len(self.cls_token[0]), len(self.blocks) - attention_blocks
        class_BCL, affinity_BLL = x_BTD.new_zeros(()), x_BTD.new_zeros(())
        for index, block in enumerate(self.blocks):
            qkv = block.attn.qkv
            attention_BTT = attention_weights(block.norm1(x_BTD), qkv.weight, qkv.bias, block.attn.num_heads)
            affinity_BLL = affinity_BLL + attention_BTT[:, C:, C:]
            if index >= first:
                class_BCL = class_BCL + attention_BTT[:, :C, C:]
            x_BTD = block(x_BTD)
        return Activations(class_BCL.unflatten(2, grid) * self._find(x_BTD, grid).relu(), affinity_BLL)

    def head_parameters(self) -> list[nn.Parameter]:
        """Return what has no pre-trained weights: the head, and the class tokens, which start equal and must become different."""
        return [self.cls_token, *self.head.parameters()]

    def load_pretrained(self, path: Path) -> None:
        """Load an ImageNet ViT of this architecture: timm's safetensors, or the .pth that DeiT published.

        As in the released code, every class token and its position embedding start as the file's single class token; the position
        embedding of the patches is resampled if it has another size in the file. What follows the blocks is not loaded.
        Raises ConfigError naming the file if it cannot be read, or has missing or unexpected keys or a shape mismatch.
        """
        try:
            tensors = weight_files.read(path).tensors
        except weight_files.ArchiveError as error:
            raise ConfigError(str(error)) from error
        found = {name: tensor for name, tensor in tensors.items() if not name.startswith(("head.", "norm."))}
        positions_1LD = found.get("pos_embed")
        if positions_1LD is not None and positions_1LD.ndim == 3 and has_square_grid(positions_1LD[0]):
            square = self.grid, self.grid
            found["pos_embed"] = resize_positions(positions_1LD[0].float(), square, 1, "bicubic", _OFFSET)[None]
        C, D = self.cls_token.shape[1:]
        own = self.state_dict()
        head = {name: own.pop(name) for name in ("head.weight", "head.bias")}
        own |= {"cls_token": own["cls_token"][:, :1], "pos_embed": own["pos_embed"][:, C - 1 :]}
        state_dict.check_fit(own, found, str(path), "use ImageNet weights of this backbone, without a distillation token")
        for name in ("cls_token", "pos_embed"):
            found[name] = torch.cat([found[name][:, :1].expand(1, C, D), found[name][:, 1:]], 1)
        self.load_state_dict(found | head)


def _plain_vit(name: str, image_size: int, drop_path: float) -> Any:
    """Return timm's ViT with random weights. Raises ConfigError as MCTformer does."""
    if not timm.is_model(name):
        raise ConfigError(f"timm has no backbone {name!r}; timm.list_models('*deit*') lists names")
    options: dict[str, Any] = {"img_size": image_size, "dynamic_img_size": True, "drop_path_rate": drop_path}
    try:
        vit: Any = timm.create_model(name, pretrained=False, num_classes=0, **options)
    except TypeError:  # the model does not take these options
        vit = None
    if type(vit) is not VisionTransformer or type(vit.blocks[0]) is not Block or not _is_plain(vit):
        raise ConfigError(f"backbone {name} is not a plain ViT with one class token; use one such as deit_small_patch16_224")
    require_whole_patches("classify.augment.crop", image_size, vit.patch_embed.patch_size[0])
    return vit


def _is_plain(vit: Any) -> bool:
    names, prefix = list(vit.state_dict()), "blocks.0.attn."
    outside = {name for name in names if not name.startswith("blocks.")}
    attention = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    return outside == _OUTSIDE and attention == _ATTENTION and vit.pos_embed.shape[1] == 1 + vit.patch_embed.num_patches


def losses(logits: Logits, labels_BC: Tensor) -> dict[str, Tensor]:
    """Return the multi-label soft-margin losses of both logits, to be added (engine.py). labels_BC: float, 1 if present."""
    named = {"class": logits.class_BC, "patch": logits.patch_BC}
    return {name: F.multilabel_soft_margin_loss(logits_BC.float(), labels_BC) for name, logits_BC in named.items()}
