"""CLIPs in the layout of Hugging Face's transformers (CLIPModel) -> open_clip's names and model_cfg. transformers is not needed.

The names are those of transformers' modeling_clip.py, and the defaults those of its configuration_clip.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weakclip.config import ConfigError

MARK = "vision_model.embeddings.class_embedding"
"""The name of a tensor that every such CLIP has."""

_NAMES = (
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.([qkv])_proj\.(weight|bias)$", r".attn.in_proj_\2.\1"),
    (r"\.self_attn\.", ".attn."),
)
"""Regular expressions of their names, and what each is replaced with, in this order."""

_TRANSPOSED = ("text_projection", "visual.proj")


def to_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of a CLIPModel under open_clip's names. Names that a CLIPModel lacks are kept."""
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.endswith(".position_ids"):  # 0, 1, 2, ..., which earlier versions stored
            continue
        for theirs, ours in _NAMES:
            name = re.sub(theirs, ours, name)
        if re.search(r"\.in_proj_\w+\.[qkv]$", name):
            parts.setdefault(name[:-2], {})[name[-1]] = tensor
        else:
            state[name] = tensor.T.contiguous() if name in _TRANSPOSED and tensor.ndim == 2 else tensor
    for name, found in parts.items():
        state[name] = torch.cat([found[letter] for letter in "qkv" if letter in found])
    return state


_TEXT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""What a config.json means by leaving a setting out."""


def architecture(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return open_clip's model_cfg of a CLIPModel's config.json.

    source: what states `config`. Raises ConfigError, which begins with it, for another model or activation, and for values of
    other types.
    """
    try:
        return _architecture(config, source)
    except (TypeError, ZeroDivisionError, KeyError, AttributeError) as error:
        raise ConfigError(f"{source}: not the settings of a CLIPModel ({type(error).__name__}: {error})") from None


def _architecture(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    if config.get("model_type") != "clip" or not {"text_config", "vision_config"} <= config.keys():
        raise ConfigError(f"{source} is of a {config.get('model_type')!r} model; only a CLIPModel (clip) is supported")
    text, vision = (
        defaults | (config[f"{tower}_config"] or config.get(f"{tower}_config_dict") or {})
        for tower, defaults in (("text", _TEXT), ("vision", _VISION))
    )
    activations = {text["hidden_act"], vision["hidden_act"]}
    if len(activations) > 1 or not activations <= {"quick_gelu", "gelu"}:
        raise ConfigError(f"{source}: hidden_act is {' and '.join(sorted(activations))}; both towers need quick_gelu, or gelu")

    def common(tower: Mapping[str, Any]) -> dict[str, Any]:
        width, inner, eps = tower["hidden_size"], tower["intermediate_size"], tower["layer_norm_eps"]
        return {
            "width": width,
            "layers": tower["num_hidden_layers"],
            "mlp_ratio": (inner if inner % width == 0 else inner + 0.5) / width,  # open_clip rounds the product down
            **({"norm_kwargs": {"eps": eps}} if eps != 1e-5 else {}),
        }

    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": activations == {"quick_gelu"},
        "vision_cfg": {
            **common(vision),
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        "text_cfg": {
            **common(text),
            "heads": text["num_attention_heads"],
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
        },
    }
