"""What decides the CAMs of each source, for the build.json of their shard set. Login nodes import it, so it must be light."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from weakclip import labels
from weakclip.checkpoints.clip_files import is_name, place, weights_file, words_unknown_to_the_demo
from weakclip.config import Config, ConfigError
from weakclip.data.index import sha256


def clip_es(config: Config) -> dict[str, Any]:
    """Return the settings of CLIP-ES and the hash of CLIP's weights, or the name by which open_clip downloads them.

    Raises ConfigError when the CLIP that ships is to find classes that it does not know.
    """
    clip = config.clip
    named = [config.cam.synonyms.get(name, name) for name in labels.class_names(config.classes)]
    if problem := words_unknown_to_the_demo(clip, named):
        raise ConfigError(problem)
    return {
        "cam": asdict(config.cam),
        "clip": {"model": clip.model, "image_size": clip.image_size},
        **({"weights": clip.pretrained} if is_name(clip.pretrained) else _made_by(place(clip.pretrained))),
    }


def mctformer(config: Config) -> dict[str, Any]:
    """Return the settings of MCTformer's CAMs and the hash of its weights."""
    names = ("source", "scales", "flip", "attention_blocks", "affinity_steps")
    weights = config.run_dir.classifier.weights("last")
    return {"cam": {name: getattr(config.cam, name) for name in names}, **_made_by(weights)}


def _made_by(path: Path) -> dict[str, str]:
    """Return the hash of the weights, or nothing while they do not exist."""
    weights = weights_file(path)
    return {} if weights is None else {"weights": sha256(weights)}
