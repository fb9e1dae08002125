"""Segmenter, the "plain ViT" of the paper's tables: a ViT as encoder and a mask transformer as decoder.

Strudel et al. (ICCV 2021, arXiv 2105.05633), section 3; released code: rstrudel/segmenter, segm/model. The encoder is timm's.
Its position embedding has the grid of a training crop, as released: it is resampled bilinearly once, when the ImageNet weights
are loaded, then trained at that size. For images of another size timm resamples it again, bicubically (released: bilinearly).

Recipe: WeakCLIP does not publish the one of its DeiT-S. Its authors retrain with the OnlineRetraining of hustvl/WeakTr (its
README, segm/config.yml, segm/train.py), given here for VOC: SGD, Nesterov momentum 0.9, no decay, learning rate 1e-4 falling to
1e-5 by (1 - step / steps) ^ 0.9, no warm-up, the encoder 0.1 x, batch 4, 100 epochs; image (4160, 520) times 0.5..2, crop 480
with no class above 75 %, flip, photometric distortion. (WeakTr's gradient clipping by patches is its own contribution.) The
notes of a COCO retraining with a ViT-B in Yingyue-L/deeplabv1-resnet38 at a231313 have the same rate, batch and epochs. Test:
windows of 480 with stride 320, scales 0.5..1.75 in steps of 0.25 with flips, mean of softmax, CRF.
Segmenter's own recipe on ADE20K: the same optimizer and schedule, learning rate 1e-3 for all, batch 8, 64 epochs, crop 512.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weakclip.checkpoints import state_dict
from weakclip.models.positions import has_square_grid, resize_positions
from weakclip.networks.base import OTHER_BACKBONE, Network, read_backbone
from weakclip.runtime.torchvision_ops import declare_missing

declare_missing()

import timm
from timm.models.vision_transformer import Block


class MaskTransformer(nn.Module):
    """The mask transformer: tokens of an encoder [B, N, E] -> scores of every class at every token [B, N, K].

    Embeddings of the classes pass through the layers with the tokens; a score is the cosine of the two, normalised over classes.
    """

    def __init__(self, num_classes: int, encoder_width: int, width: int, layers: int) -> None:
        super().__init__()
        scale = width**-0.5
        self.num_classes = num_classes
        self.proj_dec = nn.Linear(encoder_width, width)
        self.cls_emb = nn.Parameter(torch.empty(1, num_classes, width))
        block = partial(Block, width, width // 64, qkv_bias=True, proj_drop=0.1, attn_drop=0.1, norm_layer=nn.LayerNorm)
        self.blocks = nn.Sequential(*(block() for _ in range(layers)))
        self.decoder_norm = nn.LayerNorm(width)
        self.proj_patch = nn.Parameter(scale * torch.randn(width, width))
        self.proj_classes = nn.Parameter(scale * torch.randn(width, width))
        self.mask_norm = nn.LayerNorm(num_classes)
        nn.init.trunc_normal_(self.cls_emb, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens_BNE: Tensor) -> Tensor:
        tokens_BND = self.proj_dec(tokens_BNE)
        classes_BKD = self.cls_emb.expand(len(tokens_BND), -1, -1)
        both_BMD = self.decoder_norm(self.blocks(torch.cat([tokens_BND, classes_BKD], dim=1)))
        tokens_BND, classes_BKD = both_BMD.split([tokens_BND.shape[1], self.num_classes], dim=1)
        tokens_BND = F.normalize(tokens_BND @ self.proj_patch, dim=-1)
        classes_BKD = F.normalize(classes_BKD @ self.proj_classes, dim=-1)
        return self.mask_norm(tokens_BND @ classes_BKD.transpose(1, 2))


class Segmenter(Network):
    """Segmenter with logits at stride 16. If a side is not a multiple of 16, the image is padded with 0, the mean, at the right
    and bottom. The logits are then at the image's own resolution, because only there can those of the padding be cut off.
    """

    least_side = 1

    def __init__(
        self, num_classes: int, backbone: str = "deit_small_patch16_224", decoder_layers: int = 2, image_size: int = 480
    ) -> None:
        """image_size: side of the training crops, in pixels, which gives the grid of the position embedding."""
        super().__init__()
        # The released defaults: stochastic depth of 0.1 in the encoder and none in the decoder, which has dropout instead.
        self.encoder = timm.create_model(
            backbone, pretrained=False, num_classes=0, img_size=image_size, dynamic_img_size=True, drop_path_rate=0.1
        )
        width = self.encoder.embed_dim
        self.decoder = MaskTransformer(num_classes, width, width, decoder_layers)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        H, W = images_B3HW.shape[2:]
        patch = self.encoder.patch_embed.patch_size[0]
        bottom, right = -H % patch, -W % patch
        padded_B3HW = F.pad(images_B3HW, (0, right, 0, bottom))
        grid = padded_B3HW.shape[2] // patch, padded_B3HW.shape[3] // patch
        tokens_BND = self.encoder.forward_features(padded_B3HW)[:, self.encoder.num_prefix_tokens :]
        logits_BKhw = self.decoder(tokens_BND).transpose(1, 2).unflatten(2, grid)
        if bottom or right:
            padded_BKHW = F.interpolate(logits_BKhw, size=padded_B3HW.shape[2:], mode="bilinear", align_corners=False)
            return padded_BKHW[:, :, :H, :W]
        return logits_BKhw

    def head_parameters(self) -> list[nn.Parameter]:
        return list(self.decoder.parameters())

    def load_pretrained(self, path: Path) -> None:
        """Load DeiT's own .pth or timm's file of the backbone. Raises ConfigError if it does not fit the encoder."""
        found = read_backbone(path, "head.", "head_dist.")
        prefix, grid = self.encoder.num_prefix_tokens, tuple(self.encoder.patch_embed.grid_size)
        positions_1LD = found.get("pos_embed")
        if positions_1LD is not None and positions_1LD.ndim == 3 and has_square_grid(positions_1LD[0], prefix):
            found["pos_embed"] = resize_positions(positions_1LD[0].float(), grid, prefix)[
                None
            ]  # others: the check below names them
        state_dict.load_into(self.encoder, found, f"pretrained: {path}", OTHER_BACKBONE)
