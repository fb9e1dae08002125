"""Loading a trained WeakCLIP from its file: a run's trainable part, or a converted checkpoint that contains its own CLIP."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from weakclip import labels
from weakclip.checkpoints import state_dict, weight_files
from weakclip.checkpoints.weights import OTHER_CONFIG, to_inference
from weakclip.config import Config, ConfigError
from weakclip.models.weakclip import WeakCLIP

# Metadata of a converted file (weakclip.models.released): JSON lists of names.
CLASSES, EXTRA_NAMES = "classes", "extra_names"

_log = logging.getLogger(__name__)


def load_weakclip(config: Config, path: Path) -> WeakCLIP:
    """Return the config's model with the weights in `path`, in evaluation mode, on the GPU if there is one.

    Raises ArchiveError when they cannot be read, UserError for other classes, and ConfigError when they do not fit this model:
    another number of classes, another CLIP, missing or unexpected tensors.
    """
    names = labels.class_names(config.classes)
    archive = weight_files.read(path)
    tensors = archive.tensors
    if "backbone.class_embedding" in tensors:
        raise ConfigError(f"{path}: is in the released layout; first run weakclip convert {path} OUT.safetensors")
    if (made_for := weight_files.json_of(archive, CLASSES, path)) is not None:
        labels.require_same(names, made_for, str(path))
    if any(name.startswith("clip.") for name in tensors):
        config = _with_its_own_clip(config, path, weight_files.json_of(archive, EXTRA_NAMES, path) or [])
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("clip.")}
    model = WeakCLIP(config, names, strict=False)
    for name, what, keys in (
        ("decoder.head.classify.weight", "classes (K)", "classes"),
        ("adapter.level3.weight", "channels of the vision tower", "clip.model and clip.pretrained"),
    ):
        found, wanted = tensors.get(name), model.get_parameter(name)
        if found is not None and len(found) != len(wanted):
            raise ConfigError(f"{path}: made for {len(found)} {what}, but the config has {len(wanted)}; set {keys} as in its run")
    state_dict.load_into(model, tensors, str(path), OTHER_CONFIG)
    return to_inference(model)


def _with_its_own_clip(config: Config, path: Path, extra_names: list[str]) -> Config:
    if config.clip.pretrained != str(path):
        _log.warning("%s contains its own CLIP; clip.pretrained (%s) is ignored", path, config.clip.pretrained)
    return replace(
        config,
        clip=replace(config.clip, model=None, pretrained=str(path)),
        matching=replace(config.matching, extra_names=extra_names),
    )
