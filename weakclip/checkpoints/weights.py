"""Trained weights as files: a run's trainable part, or a converted checkpoint that brings its own CLIP."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from weakclip import labels
from weakclip.checkpoints import state_dict, weight_files
from weakclip.config import Config, ConfigError
from weakclip.models.interface import Trained
from weakclip.models.weakclip import WeakCLIP
from weakclip.runtime.atomic import write_whole

# Metadata of a converted file (weakclip.convert), JSON lists of names.
CLASSES, EXTRA_NAMES = "classes", "extra_names"


def find(config: Config, choice: str) -> Path:
    """The file that `choice` means: "best" or "last" of the run ("best" falls back to "last" without validation), or a path.

    Raises ConfigError when it does not exist.
    """
    folder = Path(config.run) / "weights"
    names = {"best": ("best.safetensors", "last.safetensors"), "last": ("last.safetensors",)}.get(choice)
    candidates = [folder / name for name in names] if names else [Path(choice)]
    for path in candidates:
        if path.is_file():
            return path
    raise ConfigError(f"--weights {choice}: {candidates[-1]} does not exist; train first, or set run to the run that did")


def load_model(config: Config, path: Path) -> WeakCLIP:
    """The config's model with the weights in `path`, in evaluation mode, on the GPU if there is one.

    Raises ArchiveError when they are unreadable, ConfigError when they are not this model's: other classes, another CLIP,
    missing or further tensors.
    """
    names = labels.class_names(config.classes)
    archive = weight_files.read(path)
    tensors = archive.tensors
    if "backbone.class_embedding" in tensors:
        raise ConfigError(f"{path}: in the released layout; first python -m weakclip.convert {path} OUT.safetensors")
    if (made_for := weight_files.json_of(archive, CLASSES, path)) is not None:
        labels.check_same(names, made_for, str(path))
    if any(name.startswith("clip.") for name in tensors):
        config = _with_its_own_clip(config, path, weight_files.json_of(archive, EXTRA_NAMES, path) or [])
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("clip.")}
    model = WeakCLIP(config, names)
    for name, what, cure in (
        ("decoder.head.classify.weight", "classes (K)", "classes"),
        ("adapter.level3.weight", "channels of the vision tower", "clip.model and clip.pretrained"),
    ):
        found, wanted = tensors.get(name), model.get_parameter(name)
        if found is not None and len(found) != len(wanted):
            raise ConfigError(f"{path}: made for {len(found)} {what}, but the config has {len(wanted)}; set {cure} as in its run")
    state_dict.load_into(model, tensors, str(path), "take the config that these weights were trained with")
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_into(model: Trained, path: Path) -> Trained:
    """`model` with the weights in `path`, in evaluation mode, on the GPU if there is one. Raises as `load_model` does."""
    state_dict.load_into(
        model, weight_files.read(path).tensors, str(path), "take the config that these weights were trained with"
    )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _with_its_own_clip(config: Config, path: Path, extra_names: list[str]) -> Config:
    if config.clip.pretrained != str(path):
        print(f"{path} brings its own CLIP; clip.pretrained ({config.clip.pretrained}) is not read", file=sys.stderr)
    return replace(
        config,
        clip=replace(config.clip, model=None, pretrained=str(path)),
        matching=replace(config.matching, extra_names=extra_names),
    )


def save(model: Trained, path: Path, step: int) -> None:
    """The trainable part as safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, packed(model.state_dict(), {"format": "pt", "step": str(step)}))


def packed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file in which equal contents are equal bytes: a hash of it says which weights they are.

    The library alone writes the metadata in a random order.
    """
    data = safetensors.torch.save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, dict(metadata))
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]
