"""A CLIP whose vision tower is a ViT of timm with a class token -> the same CLIP with a ViT of open_clip.

timm's ViT has two biases that open_clip's lacks. That of the patch embedding is added to the patches' positions. That of the
projection is the projection of a vector, which is added to the last norm's bias. The features stay the same but for rounding.
Where timm's model has parts of another kind, they replace open_clip's (weakclip.models.timm_parts).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weakclip.models.positions import has_square_grid
from weakclip.models.timm_parts import make_conv_stem, make_post_norm, make_rotary_and_gated


class Trunk(NamedTuple):
    """A model of timm as a ViT of open_clip. (None has QuickGELU.)"""

    settings: dict[str, Any]
    """open_clip's vision_cfg."""
    change: Callable[[Any], None] = lambda visual: None
    """Puts timm's parts into the ViT of these settings."""
    norms: str = "ln"
    """What the norms of a block are called in it."""


_COMMON = {"no_ln_pre": True, "norm_kwargs": {"eps": 1e-6}}
_EVA02_B = {"width": 768, "layers": 12, "head_width": 64, "mlp_ratio": 8 / 3, "patch_size": 16, **_COMMON}
_EVA02_L = {"width": 1024, "layers": 24, "head_width": 64, "mlp_ratio": 8 / 3, "patch_size": 14, **_COMMON}
_MOBILE_B = {"width": 768, "layers": 12, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, **_COMMON}
# open_clip rounds the product of width and mlp_ratio down.
_EVA01_G = {"width": 1408, "layers": 40, "head_width": 88, "mlp_ratio": 6144.5 / 1408, "patch_size": 14, **_COMMON}
_EVA02_E = {"width": 1792, "layers": 64, "head_width": 112, "mlp_ratio": 15360.5 / 1792, "patch_size": 14, **_COMMON}

TRUNKS = {
    "eva_giant_patch14_224": Trunk(_EVA01_G),
    "eva02_base_patch16_clip_224": Trunk(_EVA02_B, make_rotary_and_gated),
    "eva02_large_patch14_clip_224": Trunk(_EVA02_L, make_rotary_and_gated),
    "eva02_large_patch14_clip_336": Trunk(_EVA02_L, make_rotary_and_gated),
    "eva02_enormous_patch14_clip_224": Trunk(_EVA02_E, make_post_norm, norms="ls"),
    "vit_base_mci_224": Trunk(_MOBILE_B, make_conv_stem),
}
"""The supported ones by timm's names."""

BATCH_NORM_EPS = 1e-5

_BLOCK = (
    (r"norm([12])\.(\w+)", r"{norms}_\1.\2"),
    (r"attn\.qkv\.(weight|bias)", r"attn.in_proj_\1"),
    (r"attn\.([qv])_bias", r"attn.in_proj_bias.\1"),
    (r"attn\.([qkv])_proj\.(weight|bias)", r"attn.in_proj_\2.\1"),
    (r"attn\.norm\.(\w+)", r"attn.out_proj.norm.\1"),
    (r"attn\.proj\.(\w+)", r"attn.out_proj.\1"),
    (r"mlp\.fc1_g\.(\w+)", r"mlp.c_gate.\1"),
    (r"mlp\.(?:fc1|fc1_x)\.(\w+)", r"mlp.c_fc.\1"),
    (r"mlp\.norm\.(\w+)", r"mlp.c_proj.norm.\1"),
    (r"mlp\.fc2\.(\w+)", r"mlp.c_proj.\1"),
)
_NAMES = (
    (r"cls_token", "class_embedding"),
    (r"pos_embed", "positional_embedding"),
    (r"patch_embed\.(?:proj|backbone\.2\.conv)\.bias", "conv1.bias"),
    (r"patch_embed\.proj\.weight", "conv1.weight"),
    (r"patch_embed\.backbone\.(\d)\.conv\.(\w+)", r"conv1.\1.\2"),
    (r"norm\.(\w+)", r"ln_post.\1"),
    (r"head\.weight", "proj"),
    (r"head\.bias", "proj.bias"),
)
"""timm's names and open_clip's, or what those are made of below."""

_NEEDED = {"class_embedding", "positional_embedding", "conv1.bias", "ln_post.bias", "proj", "proj.bias"}


def trunk_of(architecture: Mapping[str, Any]) -> Trunk | None:
    """Return what timm's vision tower in this model_cfg is here; None for one of open_clip, and for one that is not supported."""
    vision = architecture.get("vision_cfg")
    if not isinstance(vision, Mapping) or vision.get("timm_pool") != "token" or vision.get("timm_proj", "linear"):
        return None
    return TRUNKS.get(str(vision.get("timm_model_name")))


def as_open_clips(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model_cfg with a vision tower of open_clip in place of a supported one of timm; any other one unchanged."""
    if (trunk := trunk_of(architecture)) is None:
        return dict(architecture)
    return {**architecture, "vision_cfg": {"image_size": architecture["vision_cfg"].get("image_size", 224), **trunk.settings}}


def to_open_clip(tensors: Mapping[str, Tensor], trunk: Trunk) -> dict[str, Tensor] | None:
    """Return the state dict of timm's tower under the names of the tower here; None for that of another model.

    None also where the projection cannot reach its bias, as one to a larger space may not.
    """
    try:
        state = _renamed(_without_batch_norms(tensors), trunk.norms)
    except KeyError:
        return None
    if not state.keys() >= _NEEDED:
        return None
    state["class_embedding"], positions_LD = state["class_embedding"][0, 0], state["positional_embedding"][0]
    if has_square_grid(positions_LD, prefix=0):  # none for the class
        positions_LD = torch.cat([torch.zeros_like(positions_LD[:1]), positions_LD])
    state["positional_embedding"] = torch.cat([positions_LD[:1], positions_LD[1:] + state.pop("conv1.bias")])
    state["proj"] = state["proj"].T.contiguous()
    shift_D = torch.linalg.lstsq(state["proj"].T.double(), state["proj.bias"].double()).solution
    if not torch.allclose(shift_D @ state["proj"].double(), state.pop("proj.bias").double(), atol=1e-6):
        return None
    state["ln_post.bias"] = (state["ln_post.bias"] + shift_D).float()
    return state


def _renamed(tensors: Mapping[str, Tensor], norms: str) -> dict[str, Tensor]:
    """Return the tensors under open_clip's names, in fp32. Raises KeyError for an unknown name and a missing tensor."""
    state = {_open_clips_name(name).format(norms=norms): tensor.float() for name, tensor in tensors.items()}
    for name in [name for name in state if name.endswith(".q")]:
        q, v = state.pop(name), state.pop(f"{name[:-1]}v")
        k = state.pop(f"{name[:-1]}k", torch.zeros_like(q))  # there is no bias of the keys, as it would not change the attention
        state[name[:-2]] = torch.cat([q, k, v])
    return state


def _open_clips_name(name: str) -> str:
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    inner, names, start = (block[2], _BLOCK, f"transformer.resblocks.{block[1]}.") if block else (name, _NAMES, "")
    for theirs, ours in names:
        if re.fullmatch(theirs, inner):
            return start + re.sub(theirs, ours, inner)
    raise KeyError(name)


def _without_batch_norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with the batch norms as a part of the convolutions before them. Raises KeyError if one is missing."""
    state = dict(tensors)
    for name in [name for name in state if name.endswith(".bn.weight")]:
        norm, conv = name.removesuffix("weight"), name.replace(".bn.", ".conv.")
        bias, mean, variance = (state.pop(norm + part).double() for part in ("bias", "running_mean", "running_var"))
        factor = state.pop(name).double() / (variance + BATCH_NORM_EPS).sqrt()
        state.pop(f"{norm}num_batches_tracked", None)
        state[conv] = state[conv].double() * factor[:, None, None, None]
        state[conv.replace("weight", "bias")] = bias - mean * factor
    return state
