"""CLIP weights: OpenAI's archive, an open_clip checkpoint or a directory -> an open_clip model. Never a silent random start."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from weakclip.config import ClipConfig, ConfigError
from weakclip.torchvision_ops import declare_missing

declare_missing()

import open_clip
from open_clip.pretrained import get_pretrained_url

DEMO = Path(__file__).parent / "assets" / "demo_clip"


def load_clip(config: ClipConfig) -> Any:
    """The open_clip.CLIP that `config.model` and `config.pretrained` name.

    Raises ConfigError when a file is missing or unreadable, doesn't fit the architecture, or is no plain ViT CLIP.
    """
    if config.pretrained == "none":
        return _build(_architecture(config.model), "clip.model")
    path = DEMO if config.pretrained == "demo" else Path(config.pretrained)
    if not path.exists():
        source = get_pretrained_url(config.model or "ViT-B-16-quickgelu", "openai")
        raise ConfigError(
            f"clip.pretrained: {path} does not exist; OpenAI's archive of this model is at {source or 'an open_clip release'}"
        )
    if path.is_dir():
        if config.model is not None:
            raise ConfigError(f"clip.model must be null when clip.pretrained is a directory: {path} says the architecture")
        settings = path / "open_clip_config.json"
        if not settings.is_file():
            raise ConfigError(f"clip.pretrained: {path} holds no open_clip_config.json")
        try:
            architecture, source = json.loads(settings.read_text())["model_cfg"], f"clip.pretrained: {settings}"
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"clip.pretrained: {settings} has no model_cfg ({error!r})") from error
        weights = sorted(path.glob("*.safetensors")) + sorted(path.glob("*.pt")) + sorted(path.glob("*.bin"))
        if not weights:
            raise ConfigError(f"clip.pretrained: {path} holds no weights (*.safetensors, *.pt or *.bin)")
        path = weights[0]
    else:
        architecture, source = _architecture(config.model), "clip.model"
    model = _build(architecture, source)
    _load_weights(model, path)
    return model


def _architecture(name: str | None) -> dict[str, Any]:
    architecture = open_clip.get_model_config(name) if name else None
    if architecture is None:
        raise ConfigError(f"clip.model: open_clip knows no {name!r}; open_clip.list_models() lists its names")
    return architecture


# Where an architecture may differ from a plain CLIP. Another pooling, mask, vocabulary or tokenizer gives other features.
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
        raise ConfigError(f"{source}: patch {vision.patch_size} is not supported; take a ViT with patch 14 or 16")
    try:
        return open_clip.CLIP(**{key: value for key, value in architecture.items() if key != "custom_text"})
    except TypeError as error:
        raise ConfigError(f"{source}: not an architecture of open_clip ({error})") from error


def _load_weights(model: Any, path: Path) -> None:
    try:
        state = _read_weights(path)
    except (SafetensorError, RuntimeError, ValueError, zipfile.BadZipFile, OSError) as error:
        raise ConfigError(f"clip.pretrained: {path} cannot be read as weights: {str(error).splitlines()[0]}") from error
    state = unpack_tokens(state, model.token_embedding.num_embeddings)
    for name in ("input_resolution", "context_length", "vocab_size"):  # numbers in OpenAI's archives
        state.pop(name, None)
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"clip.pretrained: {path} does not fit clip.model: {reason[:400]}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    if zipfile.is_zipfile(path) and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        return dict(torch.jit.load(str(path), map_location="cpu").state_dict())
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError("it is no file of torch.save, or holds more than tensors and plain values") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError("it holds no state dict")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def pack_tokens(state: Mapping[str, Tensor], row_ids: Tensor) -> dict[str, Tensor]:
    """`state` whose token embedding holds the rows `row_ids` (int64 [n]) alone, in that order, with their ids beside them."""
    packed = dict(state)
    return packed | {"token_embedding.rows": packed.pop("token_embedding.weight"), "token_embedding.row_ids": row_ids}


def unpack_tokens(state: Mapping[str, Tensor], vocabulary: int) -> dict[str, Tensor]:
    """The inverse of `pack_tokens`, with zeros for the tokens that were left out; any other state dict as it is."""
    unpacked = dict(state)
    if "token_embedding.rows" in unpacked:
        rows_nD, ids_n = unpacked.pop("token_embedding.rows"), unpacked.pop("token_embedding.row_ids")
        unpacked["token_embedding.weight"] = rows_nD.new_zeros(vocabulary, rows_nD.shape[1]).index_copy(0, ids_n, rows_nD)
    return unpacked
