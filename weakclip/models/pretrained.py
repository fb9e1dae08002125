"""CLIP weights: OpenAI's archive, an open_clip checkpoint or a directory -> an open_clip model, never silently a random one."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from weakclip.checkpoints import state_dict, weight_files
from weakclip.checkpoints.clip_files import SETTINGS, place, weights_file
from weakclip.config import ClipConfig, ConfigError
from weakclip.runtime.torchvision_ops import declare_missing

declare_missing()
# If transformers is installed, open_clip imports it for text towers that no CLIP here has, which takes half of a job's start-up
# time. A module that is None in sys.modules counts as not installed.
hidden = sys.modules.setdefault("transformers", None) is None  # type: ignore[arg-type]

import open_clip
from open_clip.pretrained import get_pretrained_url

if hidden:
    del sys.modules["transformers"]

# Metadata of a converted file (weakclip.convert): open_clip's model_cfg as JSON, and "doubled" if the class embedding is doubled.
ARCHITECTURE, CLASS_EMBEDDING = "model_cfg", "class_embedding"


def load_clip(config: ClipConfig) -> Any:
    """Return the open_clip.CLIP that `config.model` and `config.pretrained` name; its `architecture` is open_clip's model_cfg.

    With `double_class_embedding` its class embedding is twice CLIP's, so that a plain ViT gives the published features. (The
    released code adds the embedding once more. Doubling it is exact and can be undone; the alternative, adding it to the class
    token's position embedding, rounds.)
    Raises ConfigError when a file is missing or unreadable, does not fit the architecture, or is not a plain ViT CLIP.
    """
    if config.pretrained == "none":
        model, doubled = _build(_architecture(config.model), "clip.model"), False
    else:
        model, doubled = _load(config)
    model.visual.class_embedding.data *= (2 if config.double_class_embedding else 1) / (2 if doubled else 1)
    return model


def _load(config: ClipConfig) -> tuple[Any, bool]:
    """Return the CLIP with its weights, and whether its class embedding is already doubled."""
    path = place(config.pretrained)
    if not path.exists():
        source = get_pretrained_url(config.model or "ViT-B-16-quickgelu", "openai")
        raise ConfigError(
            f"clip.pretrained: {path} does not exist; OpenAI's archive of this model is at {source or 'an open_clip release'}"
        )
    weights, architecture = _in_directory(path) if path.is_dir() else (path, None)
    try:
        tensors, meta = archive = weight_files.read(weights)
        architecture = weight_files.json_of(archive, ARCHITECTURE, weights) or architecture
    except weight_files.ArchiveError as error:
        raise ConfigError(f"clip.pretrained: {error}") from error
    if "backbone.class_embedding" in tensors:
        raise ConfigError(f"clip.pretrained: {path} is a released WeakCLIP; first run: weakclip convert {path} OUT.safetensors")
    if architecture is not None and config.model is not None:
        raise ConfigError(f"clip.model must be null when clip.pretrained is {path}, which states its own architecture")
    state = {name.removeprefix("clip."): tensor for name, tensor in tensors.items() if name.startswith("clip.")} or tensors
    architecture = _as_large_as(state, architecture or _architecture(config.model))
    source = "clip.model" if config.model else f"clip.pretrained: {path / SETTINGS if path.is_dir() else path}"
    model = _build(architecture, source)
    state = unpack_tokens(state, model.token_embedding.num_embeddings)
    state = {"logit_scale": model.logit_scale, **state}  # not used here, and missing in released WeakCLIPs
    for name in ("input_resolution", "context_length", "vocab_size"):  # numbers in OpenAI's archives
        state.pop(name, None)
    state_dict.load_into(model, state, f"clip.pretrained: {path}", "set clip.model to the architecture of these weights")
    return model, meta.get(CLASS_EMBEDDING) == "doubled"


def _in_directory(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the weights in a directory of open_clip's layout, and their architecture."""
    settings = folder / SETTINGS
    if not settings.is_file():
        raise ConfigError(f"clip.pretrained: {folder} holds no {SETTINGS}")
    try:
        architecture = json.loads(settings.read_text())["model_cfg"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"clip.pretrained: {settings} has no model_cfg ({error!r})") from error
    if (weights := weights_file(folder)) is None:
        raise ConfigError(f"clip.pretrained: {folder} holds no weights (*.safetensors, *.pt or *.bin)")
    return weights, architecture


def _as_large_as(state: Mapping[str, Tensor], architecture: dict[str, Any]) -> dict[str, Any]:
    """Return the architecture with the image size and text length of the position embeddings in `state`, if it has them."""
    changes: dict[str, dict[str, int]] = {}
    if (positions_LD := state.get("visual.positional_embedding")) is not None and positions_LD.ndim == 2:
        patch = state["visual.conv1.weight"].shape[-1] if "visual.conv1.weight" in state else 16
        changes["vision_cfg"] = {"image_size": patch * math.isqrt(max(len(positions_LD) - 1, 1))}
    if (positions_LD := state.get("positional_embedding")) is not None and positions_LD.ndim == 2:
        changes["text_cfg"] = {"context_length": len(positions_LD)}
    return {key: value | changes.get(key, {}) if isinstance(value, dict) else value for key, value in architecture.items()}


def _architecture(name: str | None) -> dict[str, Any]:
    architecture = open_clip.get_model_config(name) if name else None
    if architecture is None:
        raise ConfigError(f"clip.model: open_clip has no model {name!r}; open_clip.list_models() lists the names")
    return architecture


# Settings in which an architecture may differ from a plain CLIP. Another pooling, mask, vocabulary or tokenizer would give other
# features.
_VARIES = {"layers", "width", "head_width", "heads", "mlp_ratio", "patch_size", "image_size", "context_length"}
_VARIES |= {"ls_init_value", "patch_dropout", "act_kwargs", "norm_kwargs"}


def _build(architecture: dict[str, Any], source: str) -> Any:
    try:
        vision, text = open_clip.CLIPVisionCfg(**architecture["vision_cfg"]), open_clip.CLIPTextCfg(**architecture["text_cfg"])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{source}: not an architecture of open_clip ({error!r})") from error
    odd = [
        item.name
        for part in (vision, text)
        for item in fields(part)
        if item.name not in _VARIES and getattr(part, item.name) != getattr(type(part)(), item.name)
    ]
    if odd or "multimodal_cfg" in architecture or not isinstance(vision.layers, int):
        what = f" ({', '.join(odd)})" if odd else ""
        raise ConfigError(f"{source}: only CLIPs with a plain ViT and CLIP's own text tower are supported{what}")
    if vision.patch_size not in (14, 16):
        raise ConfigError(f"{source}: patch {vision.patch_size} is not supported; use a ViT with patch 14 or 16")
    architecture = {key: value for key, value in architecture.items() if key != "custom_text"}
    try:
        model = open_clip.CLIP(**architecture)
    except TypeError as error:
        raise ConfigError(f"{source}: not an architecture of open_clip ({error})") from error
    model.architecture = architecture
    return model


def pack_tokens(state: Mapping[str, Tensor], row_ids: Tensor) -> dict[str, Tensor]:
    """Return `state` with only the rows `row_ids` (int64 [n]) of the token embedding, in that order, together with their ids."""
    packed = dict(state)
    return packed | {"token_embedding.rows": packed.pop("token_embedding.weight"), "token_embedding.row_ids": row_ids}


def unpack_tokens(state: Mapping[str, Tensor], vocabulary: int) -> dict[str, Tensor]:
    """Return the inverse of `pack_tokens`, with zeros for the tokens left out; any other state dict is returned unchanged."""
    unpacked = dict(state)
    if "token_embedding.rows" in unpacked:
        rows_nD, ids_n = unpacked.pop("token_embedding.rows"), unpacked.pop("token_embedding.row_ids")
        unpacked["token_embedding.weight"] = rows_nD.new_zeros(vocabulary, rows_nD.shape[1]).index_copy(0, ids_n, rows_nD)
    return unpacked
