"""A CLIP whose vision tower is a plain ViT of timm (EVA01) -> the same CLIP with a ViT of open_clip.

timm's ViT has two biases that open_clip's lacks. That of the patch embedding is added to the patches' positions. That of the
projection is the projection of a vector, which is added to the last norm's bias. The features stay the same but for rounding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PLAIN = {
    "eva_giant_patch14_224": {
        "width": 1408,
        "layers": 40,
        "head_width": 88,
        "mlp_ratio": 6144.5 / 1408,  # open_clip rounds the product down
        "patch_size": 14,
        "no_ln_pre": True,
        "norm_kwargs": {"eps": 1e-6},
    }
}
"""open_clip's settings of a ViT that computes what timm's model of this name does. (It has no QuickGELU.)"""

_NAMES = (
    (r"^cls_token$", "class_embedding"),
    (r"^pos_embed$", "positional_embedding"),
    (r"^patch_embed\.proj\.", "conv1."),
    (r"^norm\.", "ln_post."),
    (r"^head\.weight$", "proj"),
    (r"^blocks\.(\d+)\.norm([12])\.", r"transformer.resblocks.\1.ln_\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.weight$", r"transformer.resblocks.\1.attn.in_proj_weight"),
    (r"^blocks\.(\d+)\.attn\.([qv])_bias$", r"transformer.resblocks.\1.attn.in_proj_bias.\2"),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"transformer.resblocks.\1.attn.out_proj."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
    (r"^head\.bias$", "proj.bias"),
)


_NEEDED = {"cls_token", "pos_embed", "patch_embed.proj.bias", "norm.bias", "head.weight", "head.bias"}


def as_open_clips(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model_cfg with a vision tower of open_clip in place of a plain ViT of timm; any other one unchanged."""
    vision = architecture.get("vision_cfg")
    name = vision.get("timm_model_name") if isinstance(vision, Mapping) else None
    if name not in PLAIN or architecture["vision_cfg"].get("timm_pool") != "token":
        return dict(architecture)
    return {**architecture, "vision_cfg": {"image_size": architecture["vision_cfg"].get("image_size", 224), **PLAIN[name]}}


def to_open_clip(trunk: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the state dict of a plain ViT of timm under open_clip's names; None for that of any other model.

    None also where the projection cannot reach its bias, as one to a larger space may not.
    """
    if not trunk.keys() >= _NEEDED:
        return None
    state = {}
    for name, tensor in trunk.items():
        known = [(theirs, ours) for theirs, ours in _NAMES if re.search(theirs, name)]
        if not known:
            return None
        state[re.sub(*known[0], name)] = tensor.float()
    for name in [name for name in state if name.endswith(".in_proj_bias.q")]:
        q_D, v_D = state.pop(name), state.pop(f"{name[:-1]}v")
        state[name[:-2]] = torch.cat([q_D, torch.zeros_like(q_D), v_D])  # a bias of the keys would not change the attention
    state["class_embedding"], positions_LD = state["class_embedding"][0, 0], state["positional_embedding"][0]
    state["positional_embedding"] = torch.cat([positions_LD[:1], positions_LD[1:] + state.pop("conv1.bias")])
    state["proj"] = state["proj"].T.contiguous()
    shift_D = torch.linalg.lstsq(state["proj"].T.double(), state["proj.bias"].double()).solution
    if not torch.allclose(shift_D @ state["proj"].double(), state.pop("proj.bias").double(), atol=1e-6):
        return None
    state["ln_post.bias"] = (state["ln_post.bias"] + shift_D).float()
    return state
