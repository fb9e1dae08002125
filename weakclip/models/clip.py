"""The frozen CLIP, from open_clip: a vision tower with taps and a text tower with room for prompts.

B images, K classes, L tokens, N prompts, D width, E joint embedding, h x w token grid.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weakclip.config import ClipConfig, ConfigError
from weakclip.data.photometric import NORMALISATIONS, Normalisation
from weakclip.models import rotary
from weakclip.models.architectures import open_clip
from weakclip.models.attention import attend
from weakclip.models.positions import resize_positions
from weakclip.models.pretrained import load_clip
from weakclip.models.sources import contradicted
from weakclip.runtime.compilation import region


class VisionFeatures(NamedTuple):
    """What the vision tower returns."""

    taps: list[Tensor]
    """Four maps, B x D x h x w, of the patch tokens only."""
    global_BE: Tensor
    """Joint embedding of the class token."""
    visual_BEhw: Tensor
    """Joint embeddings of the patch tokens."""


class VisionTower(nn.Module):
    """A CLIP ViT that is tapped at four depths. No parameter needs a gradient, so nothing is stored for the backward pass."""

    def __init__(self, visual: Any, config: ClipConfig) -> None:
        super().__init__()
        self.patch = int(visual.patch_size[0])
        self.width = len(visual.class_embedding)
        self.rotary_side: int | None = visual.rotary_side
        self.conv1, self.ln_pre, self.ln_post = visual.conv1, visual.ln_pre, visual.ln_post
        self.class_embedding: nn.Parameter = visual.class_embedding
        self.proj: nn.Parameter = visual.proj
        self.grid = config.image_size // self.patch
        self.positional_embedding = nn.Parameter(resize_positions(visual.positional_embedding.detach(), (self.grid, self.grid)))
        self.blocks = visual.transformer.resblocks
        depth = len(self.blocks)
        self.taps = tuple(config.taps or (round(depth * part) - 1 for part in (1 / 3, 1 / 2, 2 / 3, 1)))
        if not all(0 <= tap < depth for tap in self.taps):
            raise ConfigError(f"clip.taps is {list(self.taps)}, but this vision tower has blocks 0..{depth - 1}")
        self.drop_paths = tuple(config.drop_path * index / max(depth - 1, 1) for index in range(depth))

    @region
    def forward(self, images_B3HW: Tensor, drop_path: bool = False) -> VisionFeatures:
        """Return the features of normalised images whose sides are multiples of the patch. drop_path: stochastic depth is on."""
        h, w = (side // self.patch for side in images_B3HW.shape[2:])
        x_BLD, rotation_L2d = self.embed(images_B3HW), self.rotation((h, w))
        taps = []
        for index, block in enumerate(self.blocks):
            rate = self.drop_paths[index] if drop_path else 0.0
            x_BLD = run_block(block, x_BLD, rate, rotation_L2d)
            taps += [_to_map(x_BLD[:, 1:], h, w)] * self.taps.count(index)
        joint_BLE = self.ln_post(x_BLD) @ self.proj
        return VisionFeatures(taps, joint_BLE[:, 0], _to_map(joint_BLE[:, 1:], h, w))

    def embed(self, images_B3HW: Tensor) -> Tensor:
        """Return the tokens that enter the first block, B x (1 + h x w) x D: the class token, then the patches row by row."""
        patches_BDhw = self.conv1(images_B3HW)
        B, D, h, w = patches_BDhw.shape
        positions_LD = resize_positions(self.positional_embedding, (h, w))
        cls_B1D = (self.class_embedding + positions_LD[0]).to(patches_BDhw.dtype).expand(B, 1, D)
        x_BLD = torch.cat([cls_B1D, patches_BDhw.flatten(2).transpose(1, 2) + positions_LD[1:]], dim=1)
        return self.ln_pre(x_BLD)

    def rotation(self, grid: tuple[int, int]) -> Tensor | None:
        """Return the rotary position embedding of h x w patches, float32 (h w) x 2 d; None for a tower without one."""
        if self.rotary_side is None:
            return None
        head = self.width // self.blocks[0].attn.num_heads
        return rotary.rotation(grid, head, self.rotary_side, self.proj.device)


class TextTower(nn.Module):
    """A CLIP text transformer over [start] prompts name [end]. It is frozen, but the prompts' gradient flows through it."""

    def __init__(self, clip: Any, length: int) -> None:
        super().__init__()
        if length > clip.positional_embedding.shape[0]:
            raise ConfigError(
                f"clip.name_tokens + prompts.length, or a text of cam.prompts, has {length} tokens, but this CLIP reads at most "
                f"{clip.positional_embedding.shape[0]} tokens; lower one of them"
            )
        self.token_embedding, self.ln_final = clip.token_embedding, clip.ln_final
        self.text_projection: nn.Parameter = clip.text_projection
        self.positional_embedding = nn.Parameter(clip.positional_embedding[:length].clone())
        self.blocks = clip.transformer.resblocks
        self.width = int(self.ln_final.normalized_shape[0])

    @region
    def forward(self, names_KL: Tensor, prompts_ND: Tensor) -> Tensor:
        """Return the class embeddings, K x E. names_KL: token ids [start, name..., end, 0...]."""
        K, N = names_KL.shape[0], prompts_ND.shape[0]
        names_KLD = self.token_embedding(names_KL)
        x_KLD = torch.cat([names_KLD[:, :1], prompts_ND.expand(K, -1, -1).to(names_KLD.dtype), names_KLD[:, 1:]], dim=1)
        x_KLD = x_KLD + self.positional_embedding[: x_KLD.shape[1]]
        for block in self.blocks:
            x_KLD = run_block(block, x_KLD, causal=True)
        end_K = names_KL.argmax(-1) + N  # the end token has the largest id
        return self.ln_final(x_KLD[torch.arange(K, device=x_KLD.device), end_K]) @ self.text_projection


class FrozenClip(nn.Module):
    """Both towers of a CLIP. No parameter needs a gradient.

    strict: whether a source that contradicts the recipe is an error; for a network that was trained with it, it is a warning.
    """

    def __init__(self, config: ClipConfig, prompts: int, strict: bool = True) -> None:
        super().__init__()
        self.strict = strict
        clip = load_clip(config, strict)
        patch = int(clip.visual.patch_size[0])
        if config.image_size % patch:
            raise ConfigError(f"clip.image_size is {config.image_size}; it must be a multiple of the patch, {patch}")
        self.vision = VisionTower(clip.visual, config)
        self.text = TextTower(clip, config.name_tokens + prompts)
        self.embedding = int(self.vision.proj.shape[1])
        self.logit_scale: Tensor
        """Factor on the cosine of image and text before CLIP's softmax, as trained; only CAMs use it."""
        self.register_buffer("logit_scale", clip.logit_scale.detach().exp(), persistent=False)
        vision_cfg = {**clip.architecture["vision_cfg"], "image_size": config.image_size}
        text_cfg = {**clip.architecture["text_cfg"], "context_length": len(self.text.positional_embedding)}
        self.architecture = {**clip.architecture, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
        """open_clip's model_cfg of these towers, with the sizes that their position embeddings have here."""
        self.trained_with: Normalisation | None = clip.normalisation
        """Mean and std of its training's images; None where the source of the weights does not state them."""
        self.requires_grad_(False).eval()

    def normalisation(self, key: str, choice: str) -> Normalisation:
        """Return the mean and std that `choice` (imagenet, clip, source), the recipe's value of `key`, means for this CLIP.

        Raises ConfigError, or warns if not strict, when the CLIP was not trained with that, as far as its source states it.
        ImageNet's for a CLIP trained with CLIP's own are no error, because the published recipe does that with OpenAI's weights.
        """
        stated = self.trained_with
        if (chosen := NORMALISATIONS.get(choice, stated)) is None:
            raise ConfigError(f"{key}: clip.pretrained does not state its mean and std; set {key} to imagenet or clip")
        as_published = (chosen, stated) == (NORMALISATIONS["imagenet"], NORMALISATIONS["clip"])
        if stated is None or stated == chosen or as_published:
            return chosen
        mean, std = (", ".join(f"{value / 255:.4g}" for value in values) for values in stated)
        problem = f"{key} is {choice}, but clip.pretrained was trained with mean {mean} and std {std}; set {key} to source"
        contradicted(problem, self.strict)
        return chosen


def tokenize(names: Sequence[str], length: int | None = None) -> Tensor:
    """Return token ids, int64 K x `length` (None: that of the longest): start, name, end, zeros.

    Raises ConfigError for a name that does not fit; names are never truncated.
    """
    tokenizer = _tokenizer()
    start, end = [tokenizer.sot_token_id], [tokenizer.eot_token_id]
    found = [start + tokenizer.encode(name.replace("_", " ")) + end for name in names]
    length = max(map(len, found)) if length is None else length
    ids_KL = torch.zeros(len(names), length, dtype=torch.int64)
    for row, (name, ids) in enumerate(zip(names, found, strict=True)):
        if len(ids) > length:
            raise ConfigError(f"class name {name!r} takes {len(ids)} tokens; set clip.name_tokens to {len(ids)} or more")
        ids_KL[row, : len(ids)] = torch.tensor(ids)
    return ids_KL


@functools.cache
def _tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer()  # reads its vocabulary, which takes 0.1 s


def run_block(
    block: Any, x_BLD: Tensor, drop_path: float = 0.0, rotation_L2d: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Run one of open_clip's residual blocks, with stochastic depth in both branches."""
    attended_BLD = attend(block.attn, block.ln_1(x_BLD), rotation_L2d, causal)
    x_BLD = x_BLD + _drop_path(block.ls_1(attended_BLD), drop_path)
    return x_BLD + _drop_path(block.ls_2(block.mlp(block.ln_2(x_BLD))), drop_path)


def _to_map(tokens_BLD: Tensor, h: int, w: int) -> Tensor:
    return tokens_BLD.transpose(1, 2).unflatten(2, (h, w)).contiguous()


def _drop_path(branch_BLD: Tensor, rate: float) -> Tensor:
    """Apply stochastic depth: drop a sample's branch with probability `rate`, and scale the others to keep the mean."""
    if rate == 0.0:
        return branch_BLD
    keep_B11 = torch.empty(branch_BLD.shape[0], 1, 1, device=branch_BLD.device).bernoulli_(1 - rate)
    return branch_BLD * (keep_B11 / (1 - rate)).to(branch_BLD.dtype)
