"""open_clip -> a frozen vision tower with taps and a frozen text tower with room for prompts.

B images, K classes, L tokens, N prompts, D width, E joint embedding, h x w token grid.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weakclip.config import ClipConfig, ConfigError
from weakclip.torchvision_ops import declare_missing

declare_missing()

import open_clip
from open_clip.pretrained import get_pretrained_url
from safetensors import SafetensorError
from safetensors.torch import load_file

DEMO = Path(__file__).parent / "assets" / "demo_clip"


class VisionFeatures(NamedTuple):
    taps: list[Tensor]
    """Four maps, B x D x h x w, patch tokens only."""
    global_BE: Tensor
    visual_BEhw: Tensor


class VisionTower(nn.Module):
    """A CLIP ViT that is tapped at four depths. It runs without a graph, so nothing of it is kept for backward."""

    def __init__(self, visual: Any, image_size: int, drop_path: float) -> None:
        super().__init__()
        self.patch = int(visual.conv1.kernel_size[0])
        self.width = int(visual.conv1.out_channels)
        self.conv1, self.ln_pre, self.ln_post = visual.conv1, visual.ln_pre, visual.ln_post
        self.class_embedding: nn.Parameter = visual.class_embedding
        self.proj: nn.Parameter = visual.proj
        self.grid = image_size // self.patch
        self.positional_embedding = nn.Parameter(_resize_positions(visual.positional_embedding, self.grid, self.grid))
        self.blocks = visual.transformer.resblocks
        depth = len(self.blocks)
        # Blocks 3, 5, 7 and 11 of 12; the same fractions of another depth.
        self.taps = tuple(round(depth * part) - 1 for part in (1 / 3, 1 / 2, 2 / 3, 1))
        self.drop_paths = tuple(drop_path * index / max(depth - 1, 1) for index in range(depth))

    @torch.no_grad()
    def forward(self, images_B3HW: Tensor, drop_path: bool = False) -> VisionFeatures:
        """Features of normalised images whose sides are multiples of the patch. `drop_path`: stochastic depth is active."""
        patches_BDhw = self.conv1(images_B3HW)
        B, D, h, w = patches_BDhw.shape
        positions_LD = _resize_positions(self.positional_embedding, h, w)
        # Published: the class token is the class embedding twice, plus its position.
        cls_B1D = (2 * self.class_embedding + positions_LD[0]).to(patches_BDhw.dtype).expand(B, 1, D)
        x_BLD = torch.cat([cls_B1D, patches_BDhw.flatten(2).transpose(1, 2) + positions_LD[1:]], dim=1)
        x_BLD = self.ln_pre(x_BLD)
        taps = []
        for index, block in enumerate(self.blocks):
            rate = self.drop_paths[index] if drop_path else 0.0
            x_BLD = x_BLD + _drop_path(block.ls_1(block.attention(q_x=block.ln_1(x_BLD))), rate)
            x_BLD = x_BLD + _drop_path(block.ls_2(block.mlp(block.ln_2(x_BLD))), rate)
            taps += [_to_map(x_BLD[:, 1:], h, w)] * self.taps.count(index)
        joint_BLE = self.ln_post(x_BLD) @ self.proj
        return VisionFeatures(taps, joint_BLE[:, 0], _to_map(joint_BLE[:, 1:], h, w))


class TextTower(nn.Module):
    """A CLIP text transformer over [start] prompts name [end]. Frozen, but the prompts' gradient flows through it."""

    def __init__(self, clip: Any, length: int) -> None:
        super().__init__()
        if length > clip.positional_embedding.shape[0]:
            raise ConfigError(
                f"clip.name_tokens + prompts.length is {length}, but this CLIP reads at most "
                f"{clip.positional_embedding.shape[0]} tokens; lower one of them"
            )
        self.token_embedding, self.ln_final = clip.token_embedding, clip.ln_final
        self.text_projection: nn.Parameter = clip.text_projection
        self.positional_embedding = nn.Parameter(clip.positional_embedding[:length].clone())
        self.blocks = clip.transformer.resblocks
        self.width = int(self.ln_final.normalized_shape[0])

    def forward(self, names_KL: Tensor, prompts_ND: Tensor) -> Tensor:
        """Class embeddings, K x E. names_KL: token ids [start, name..., end, 0...]."""
        K, N = names_KL.shape[0], prompts_ND.shape[0]
        names_KLD = self.token_embedding(names_KL)
        x_KLD = torch.cat([names_KLD[:, :1], prompts_ND.expand(K, -1, -1).to(names_KLD.dtype), names_KLD[:, 1:]], dim=1)
        L = x_KLD.shape[1]
        x_KLD = x_KLD + self.positional_embedding[:L]
        causal_LL = torch.full((L, L), float("-inf"), device=x_KLD.device).triu(1)
        for block in self.blocks:
            x_KLD = block(x_KLD, attn_mask=causal_LL)
        end_K = names_KL.argmax(-1) + N  # the end token has the largest id
        return self.ln_final(x_KLD[torch.arange(K, device=x_KLD.device), end_K]) @ self.text_projection


class FrozenClip(nn.Module):
    """Both towers of a CLIP, none of whose parameters needs a gradient."""

    def __init__(self, config: ClipConfig, prompts: int) -> None:
        super().__init__()
        clip = _load(config)
        patch = int(clip.visual.conv1.kernel_size[0])
        if config.image_size % patch:
            raise ConfigError(f"clip.image_size is {config.image_size}; it must be a multiple of the patch, {patch}")
        self.vision = VisionTower(clip.visual, config.image_size, config.drop_path)
        self.text = TextTower(clip, config.name_tokens + prompts)
        self.embedding = int(self.vision.proj.shape[1])
        self.requires_grad_(False).eval()


def tokenize(names: Sequence[str], length: int) -> Tensor:
    """Token ids, int64 K x `length`: start, name, end, zeros.

    Raises ConfigError for a name that does not fit; it is never cut.
    """
    tokenizer = open_clip.SimpleTokenizer()
    ids_KL = torch.zeros(len(names), length, dtype=torch.int64)
    for row, name in enumerate(names):
        ids = [tokenizer.sot_token_id, *tokenizer.encode(name.replace("_", " ")), tokenizer.eot_token_id]
        if len(ids) > length:
            raise ConfigError(f"class name {name!r} takes {len(ids)} tokens; set clip.name_tokens to {len(ids)} or more")
        ids_KL[row, : len(ids)] = torch.tensor(ids)
    return ids_KL


def _resize_positions(embedding_LD: Tensor, h: int, w: int) -> Tensor:
    """Position embedding for an h x w grid, by bilinear interpolation; row 0 (class token) stays."""
    side = round((embedding_LD.shape[0] - 1) ** 0.5)
    if (h, w) == (side, side):
        return embedding_LD.detach()
    grid_1Dhw = embedding_LD[1:].T.reshape(1, -1, side, side)
    grid_1Dhw = F.interpolate(grid_1Dhw, size=(h, w), mode="bilinear")
    return torch.cat([embedding_LD[:1], grid_1Dhw.flatten(2)[0].T]).detach()


def _to_map(tokens_BLD: Tensor, h: int, w: int) -> Tensor:
    return tokens_BLD.transpose(1, 2).unflatten(2, (h, w)).contiguous()


def _drop_path(branch_BLD: Tensor, rate: float) -> Tensor:
    """Stochastic depth: a sample's branch is dropped with probability `rate`, the others' scaled to keep the mean."""
    if rate == 0.0:
        return branch_BLD
    keep_B11 = torch.empty(branch_BLD.shape[0], 1, 1, device=branch_BLD.device).bernoulli_(1 - rate)
    return branch_BLD * (keep_B11 / (1 - rate)).to(branch_BLD.dtype)


def _load(config: ClipConfig) -> Any:
    """An open_clip model with the weights that `config.pretrained` names."""
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


def _build(architecture: dict[str, Any], source: str) -> nn.Module:
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
    if "token_embedding.rows" in state:  # a small vocabulary keeps only the rows that occur
        rows, ids = state.pop("token_embedding.rows"), state.pop("token_embedding.row_ids")
        state["token_embedding.weight"] = torch.zeros_like(model.token_embedding.weight).index_copy(0, ids, rows.float())
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
