"""The architectures of open_clip: which of them the towers here can be, and the reasons for which the others are refused."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from weakclip.config import ConfigError
from weakclip.models.timm_vit import TRUNKS, as_open_clips, trunk_of
from weakclip.runtime.torchvision_ops import declare_missing

declare_missing()
# If transformers is installed, open_clip imports it for text towers that no CLIP here has, which takes half of a job's start-up
# time. A module that is None in sys.modules counts as not installed.
hidden = sys.modules.setdefault("transformers", None) is None  # type: ignore[arg-type]

import open_clip

if hidden:
    del sys.modules["transformers"]

PATCHES = (14, 16)


def named(name: str | None) -> dict[str, Any]:
    """Return open_clip's model_cfg of `clip.model`. Raises ConfigError for an unknown name."""
    architecture = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if architecture is None:
        raise ConfigError(f"clip.model: open_clip has no model {name!r}; open_clip.list_models() lists the names")
    return architecture


def sibling(name: str, quick_gelu: bool) -> str | None:
    """Return open_clip's name of the same architecture with QuickGELU or with GELU; None if it has none."""
    bare = name.removesuffix("-quickgelu")
    found = f"{bare}-quickgelu" if quick_gelu else bare
    return found if found in open_clip.list_models() else None


def check(architecture: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError, which begins with `source`, unless the towers here can be of this model_cfg."""
    try:
        reasons, patch = list(refusals(architecture)), as_open_clips(architecture)["vision_cfg"].get("patch_size", 16)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{source}: not an architecture of open_clip ({error!r})") from error
    if reasons:
        raise ConfigError(f"{source}: only CLIPs with a ViT and CLIP's own text tower are supported: {'; '.join(reasons)}")
    if patch not in PATCHES:
        raise ConfigError(f"{source}: patch {patch} is not supported; use a ViT with patch 14 or 16")


def build(architecture: Mapping[str, Any], source: str) -> Any:
    """Return an open_clip.CLIP of this model_cfg with random weights; its `architecture` is that model_cfg.

    `rotary_side` of its vision tower is the side of the grid of its rotary position embedding, if it has one (else None).
    source: what states the architecture. Raises ConfigError, which begins with it, for one that is not supported.
    """
    check(architecture, source)
    architecture = {key: value for key, value in architecture.items() if key != "custom_text"}
    try:
        model = open_clip.CLIP(**as_open_clips(architecture))
    except TypeError as error:
        raise ConfigError(f"{source}: not an architecture of open_clip ({error})") from error
    model.visual.rotary_side = None
    if trunk := trunk_of(architecture):
        trunk.change(model.visual)
    model.architecture = architecture
    return model


# Settings in which an architecture may differ from a plain CLIP. Another pooling, mask, vocabulary or tokenizer would give other
# features.
_VARIES = {"layers", "width", "head_width", "heads", "mlp_ratio", "patch_size", "image_size", "context_length"}
_VARIES |= {"ls_init_value", "patch_dropout", "act_kwargs", "norm_kwargs", "no_ln_pre"}

_REASONS = {
    "vision_cfg": {
        "timm_model_name": "is timm's {}, {}",
        "attentional_pool": "pools by attention, so patches have no joint embedding",
        "pool_type": "pools its patches ({}) and not the class token",
    },
    "text_cfg": {
        "hf_model_name": "is Hugging Face's {}",
        "hf_tokenizer_name": "has the tokenizer {}, not CLIP's",
        "vocab_size": "has {} tokens, not CLIP's",
        "embed_cls": "ends in a class token",
        "no_causal_mask": "is not causal, so that padding changes a name's embedding",
    },
}
"""Why a setting of a tower is refused, the most telling ones first; {} is its value."""

_TIMM = (
    (rf"^({'|'.join(TRUNKS)})$", "which must have timm_pool token and timm_proj null"),
    (r"siglip|pe_core", "which pools by attention, so patches have no joint embedding"),
    (r"^vit_\w+_gap", "which has no class token"),
    (r"^vit_relpos", "whose attention has relative positions"),
    (r"^vit_", "which is not one of those that are known here"),
    (r"", "which is not a plain ViT"),
)
"""What is special about timm's models, by regular expressions of their names; the first that fits."""


def refusals(architecture: Mapping[str, Any]) -> Iterator[str]:
    """Yield one reason for each tower of this model_cfg that the towers here cannot compute; none for a plain CLIP of any size.

    Raises KeyError or TypeError for what is no model_cfg.
    """
    architecture = as_open_clips(architecture)
    towers = {"vision_cfg": open_clip.CLIPVisionCfg, "text_cfg": open_clip.CLIPTextCfg}
    for tower, kind in towers.items():
        cfg, name = kind(**architecture[tower]), f"its {tower.removesuffix('_cfg')} tower"
        odd = {item.name: getattr(cfg, item.name) for item in fields(cfg) if item.name not in _VARIES}
        odd = {setting: value for setting, value in odd.items() if value != getattr(kind(), setting)}
        if not isinstance(cfg.layers, int):
            yield f"{name} is a ResNet"
        elif telling := next((setting for setting in _REASONS[tower] if setting in odd), None):
            value = odd[telling]
            special = next((what for pattern, what in _TIMM if re.search(pattern, str(value))), "")
            yield f"{name} {_REASONS[tower][telling].format(value, special)}"
        elif odd:
            yield f"{name} sets {', '.join(odd)}"
    if "multimodal_cfg" in architecture:
        yield "it has a text decoder (CoCa)"


def as_large_as(state: Mapping[str, Tensor], architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return the architecture with the image size and text length of the position embeddings in `state`, if it has them."""
    changes: dict[str, dict[str, int]] = {}
    if (positions_LD := state.get("visual.positional_embedding")) is not None and positions_LD.ndim == 2:
        patch = state["visual.conv1.weight"].shape[-1] if "visual.conv1.weight" in state else 16
        changes["vision_cfg"] = {"image_size": patch * math.isqrt(max(len(positions_LD) - 1, 1))}
    if (positions_LD := state.get("positional_embedding")) is not None and positions_LD.ndim == 2:
        changes["text_cfg"] = {"context_length": len(positions_LD)}
    return {key: value | changes.get(key, {}) if isinstance(value, dict) else value for key, value in architecture.items()}
