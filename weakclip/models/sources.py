"""What `clip.pretrained` names -> weights under open_clip's names, and what their source says about them.

A source is OpenAI's archive, a file of open_clip, of Hugging Face's CLIPModel or of ours, a directory of such a file and its
config, a tag of open_clip, or a model on the Hugging Face Hub. open_clip downloads the last two.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from weakclip.checkpoints import weight_files
from weakclip.checkpoints.clip_files import HUB, OPEN_CLIP, is_name, place, weights_file
from weakclip.config import ClipConfig, ConfigError
from weakclip.data.photometric import NORMALISATIONS, Normalisation
from weakclip.models import architectures, hub, hugging_face, timm_vit
from weakclip.models.architectures import open_clip
from weakclip.models.hub import HUGGING_FACE, PREPROCESSOR

_log = logging.getLogger(__name__)

# Metadata of a converted file (weakclip.convert): open_clip's model_cfg as JSON, "doubled" if the class embedding is doubled,
# "quick_gelu" or "gelu" where the architecture is not stated, and open_clip's preprocess_cfg as JSON.
ARCHITECTURE, CLASS_EMBEDDING, ACTIVATION, PREPROCESSING = "model_cfg", "class_embedding", "activation", "preprocess_cfg"

OPENAIS_NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""Numbers in OpenAI's archives beside the weights, by which they are recognised."""


def preprocessing(normalisation: Normalisation | None) -> dict[str, str]:
    """Return the metadata of a converted file that states `normalisation`; none for None."""
    if normalisation is None:
        return {}
    mean, std = ([value / 255 for value in values] for values in normalisation)
    return {PREPROCESSING: json.dumps({"mean": mean, "std": std})}


OPENAIS_METADATA = {ACTIVATION: "quick_gelu", **preprocessing(NORMALISATIONS["clip"])}
"""The metadata that a converted archive of OpenAI's has instead of its numbers."""


class Stated(NamedTuple):
    """What a source says about its weights; None is what it leaves open."""

    architecture: dict[str, Any] | None = None
    """open_clip's model_cfg."""
    quick_gelu: bool | None = None
    """Whether they were trained with QuickGELU; False: with GELU."""
    normalisation: Normalisation | None = None
    """Mean and std with which they were trained."""
    settings: Path | None = None
    """The file that states the architecture."""


class Source(NamedTuple):
    """The weights of a CLIP."""

    path: Path
    """The file that holds them."""
    kind: str
    """Whose format it is, for messages."""
    state: dict[str, Tensor]
    """Their state dict under open_clip's names, as far as they are recognised."""
    stated: Stated
    doubled: bool
    """Whether the class embedding is already doubled."""


def read(config: ClipConfig) -> Source:
    """Return the weights that `config.pretrained` names.

    Raises ConfigError when they are missing, unreadable, or in a format of another model, which it names.
    """
    path, stated = _named(config) if is_name(config.pretrained) else _placed(config)
    try:
        tensors, meta = archive = weight_files.read(path)
        architecture, images = (weight_files.json_of(archive, key, path) or {} for key in (ARCHITECTURE, PREPROCESSING))
    except weight_files.ArchiveError as error:
        raise ConfigError(f"clip.pretrained: {error}") from error
    if not isinstance(architecture, dict) or not isinstance(images, dict):
        raise ConfigError(f"clip.pretrained: {path}: its metadata {ARCHITECTURE} and {PREPROCESSING} must be settings")
    if architecture:
        stated = stated._replace(architecture=architecture, quick_gelu=architecture.get("quick_gelu", False), settings=path)
    if images:
        stated = stated._replace(normalisation=_normalisation(images, "mean", "std", path))
    if ACTIVATION in meta:
        stated = stated._replace(quick_gelu=meta[ACTIVATION] == "quick_gelu")
    if stated.architecture is not None:
        _require_no_model(config)
    architecture = stated.architecture or (architectures.named(config.model) if config.model else {})
    kind, state = recognised(tensors, path, timm_vit.trunk_of(architecture))
    if kind == OPENAIS:
        stated = stated._replace(quick_gelu=True, normalisation=stated.normalisation or NORMALISATIONS["clip"])
    return Source(path, kind, state, stated, meta.get(CLASS_EMBEDDING) == "doubled")


def _require_no_model(config: ClipConfig) -> None:
    if config.model is not None:
        raise ConfigError(f"clip.model must be null when clip.pretrained is {config.pretrained}: it states its own architecture")


# ------------------------------------------------------------------------------------------------------------- formats

OPENAIS = "OpenAI's archive"

TRUNK = "visual.trunk."
"""What the names of a vision tower of timm begin with."""

_REFUSED = (
    ("backbone.class_embedding", "a released WeakCLIP; first run: weakclip convert {path} OUT.safetensors"),
    ("prompts_ND", "the trained part of a WeakCLIP, without its CLIP; set clip.pretrained to the CLIP that it was trained on"),
    ("vision_model.head.probe", "Hugging Face's SigLIP, whose attention pooling gives patches no joint embedding"),
    ("text_decoder.", "open_clip's CoCa, whose text tower serves a decoder"),
    ("text.cls_emb", "open_clip's CoCa, whose text tower serves a decoder"),
    (TRUNK, "a CLIP of open_clip with a vision tower of timm that is not supported, or not that of the architecture"),
    ("visual.layer1.", "a CLIP with a ResNet; only ViTs are supported"),
    ("text.text_projection.weight", "open_clip's CustomTextCLIP with a text projection that has a bias"),
    ("text.transformer.embeddings.", "open_clip's CustomTextCLIP with a text tower of Hugging Face"),
    ("text.transformer.encoder.", "open_clip's CustomTextCLIP with a text tower of Hugging Face"),
    ("visual.blocks.", "an EVA-CLIP in its authors' format; take the same weights from open_clip"),
    ("image_encoder.", "Apple's MobileCLIP in its authors' format; open_clip's MobileCLIP-B is supported"),
    ("patch_embed.proj.", "a ViT of timm without a text tower; a CLIP's two towers are needed"),
    ("embeddings.patch_embeddings.projection.", "a ViT of Hugging Face without a text tower; a CLIP's two towers are needed"),
)
"""What the names of a format begin with that is not supported, and what to say about it; the first that fits counts."""


def recognised(tensors: Mapping[str, Tensor], path: Path, timms: timm_vit.Trunk | None) -> tuple[str, dict[str, Tensor]]:
    """Return whose format the tensors in `path` are in, and them under open_clip's names: unchanged where it is not known.

    timms: the vision tower of the architecture if it is one of timm.
    Raises ConfigError for the format of another model.
    """
    state, open_clips = dict(tensors), "open_clip's CLIP"
    trunk = {name.removeprefix(TRUNK): tensor for name, tensor in state.items() if name.startswith(TRUNK)}
    if trunk and timms and (vision := timm_vit.to_open_clip(trunk, timms)):
        state = {name: tensor for name, tensor in state.items() if not name.startswith(TRUNK)}
        state |= {f"visual.{name}": tensor for name, tensor in vision.items()}
        open_clips += " with a ViT of timm"
    if converted := {name.removeprefix("clip."): tensor for name, tensor in state.items() if name.startswith("clip.")}:
        return "a CLIP in a WeakCLIP of ours", converted
    if what := next((what for mark, what in _REFUSED if any(name.startswith(mark) for name in state)), None):
        raise ConfigError(f"clip.pretrained: {path} is {what.format(path=path)}")
    if hugging_face.MARK in state:
        return "Hugging Face's CLIPModel", hugging_face.to_open_clip(state)
    if all(number in state for number in OPENAIS_NUMBERS):
        return OPENAIS, {name: tensor for name, tensor in state.items() if name not in OPENAIS_NUMBERS}
    if "text.token_embedding.weight" in state:  # CustomTextCLIP
        return open_clips, {name.removeprefix("text."): tensor for name, tensor in state.items()}
    if "visual.class_embedding" in state:
        return open_clips, state
    return "of no known format", state


# ------------------------------------------------------------------------------------------------ files and directories


def _placed(config: ClipConfig) -> tuple[Path, Stated]:
    """Return the weights on this disk that `config.pretrained` is or holds."""
    path = place(config.pretrained)
    if not path.exists():
        source = open_clip.pretrained.get_pretrained_url(config.model or "ViT-B-16-quickgelu", "openai")
        raise ConfigError(
            f"clip.pretrained: {path} does not exist; OpenAI's archive of this model is at {source or 'an open_clip release'}"
        )
    return in_directory(path) if path.is_dir() else (path, Stated())


def in_directory(folder: Path) -> tuple[Path, Stated]:
    """Return the weights in a directory of open_clip's or transformers' layout, and what its JSON files say about them."""
    if (settings := folder / OPEN_CLIP).is_file():
        found = _json(settings)
        if not isinstance(architecture := found.get("model_cfg"), dict):
            raise ConfigError(f"clip.pretrained: {settings} has no model_cfg")
        normalisation = _normalisation(found.get("preprocess_cfg") or {}, "mean", "std", settings)
    elif (settings := folder / HUGGING_FACE).is_file():
        architecture = hugging_face.architecture(_json(settings), f"clip.pretrained: {settings}")
        preprocessor = folder / PREPROCESSOR
        found = _json(preprocessor) if preprocessor.is_file() else {}
        if found.get("do_normalize") is False:
            found = {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
        normalisation = _normalisation(found, "image_mean", "image_std", preprocessor)
    else:
        raise ConfigError(f"clip.pretrained: {folder} holds no {OPEN_CLIP} (open_clip) or {HUGGING_FACE} (Hugging Face's CLIP)")
    if (weights := weights_file(folder)) is None:
        raise ConfigError(f"clip.pretrained: {folder} holds no weights (*.safetensors, *.pt or *.bin)")
    if re.search(r"-\d{5}-of-\d{5}\.", weights.name):
        raise ConfigError(f"clip.pretrained: {weights} is one of several files of weights; save them as one .safetensors file")
    return weights, Stated(architecture, architecture.get("quick_gelu", False), normalisation, settings)


def is_stated_beside(weights: Path) -> bool:
    """Return whether the directory of a file of weights states their architecture."""
    return any((weights.parent / settings).is_file() for settings in (OPEN_CLIP, HUGGING_FACE))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ConfigError(f"clip.pretrained: {path} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"clip.pretrained: {path} holds a {type(found).__name__} instead of settings")
    return found


def _normalisation(settings: Mapping[str, Any], mean: str, std: str, path: Path) -> Normalisation | None:
    """Return mean and std, stated for 0..1; None where they are left out."""
    if mean not in settings and std not in settings:
        return None
    values = settings.get(mean), settings.get(std)
    match values:
        case [[float() | int(), float() | int(), float() | int()], [float() | int(), float() | int(), float() | int()]]:
            return Normalisation.of_unit(*values)
    raise ConfigError(f"clip.pretrained: {path} must state {mean} and {std} as three numbers each, is {values}")


# ----------------------------------------------------------------------------------------------------- tags and the Hub


def _named(config: ClipConfig) -> tuple[Path, Stated]:
    """Return the weights that a tag or a name on the Hub means."""
    if config.pretrained.startswith(HUB):
        _require_no_model(config)
        return in_directory(hub.folder_of(config.pretrained.removeprefix(HUB)))
    name, tag = config.model, config.pretrained
    if name is None:
        raise ConfigError(f"clip.pretrained: {tag} does not exist; for a tag of open_clip set clip.model to a name of open_clip")
    architecture = architectures.named(name)
    architectures.check(architecture, "clip.model")
    cfg = open_clip.pretrained.get_pretrained_cfg(name, tag)
    if not cfg:
        tags = ", ".join(open_clip.pretrained.list_pretrained_tags_by_model(name))
        models = " or ".join(open_clip.pretrained.list_pretrained_models_by_tag(tag))
        raise ConfigError(
            f"clip.pretrained: {tag} neither exists nor is a tag of open_clip for clip.model={name}, whose tags are: "
            f"{tags or 'none'}{f'; {tag} is for clip.model={models}' if models else ''}"
        )
    stated = Stated(None, bool(cfg.get("quick_gelu")), Normalisation.of_unit(cfg["mean"], cfg["std"]))
    check_activation(stated, architecture, f"clip.pretrained: {tag}", name)
    return hub.weights_of(tag, name, cfg), stated


# ----------------------------------------------------------------------------------------------------------- agreement


def contradicted(message: str, strict: bool) -> None:
    """Raise ConfigError for a source that contradicts the recipe, or only warn where a network was trained that way already."""
    if strict:
        raise ConfigError(message)
    _log.warning("%s; it was trained so, and stays so", message)


def check_activation(stated: Stated, architecture: Mapping[str, Any], where: str, model: str | None, strict: bool = True) -> None:
    """Raise ConfigError, or warn if not `strict`, when the architecture computes another activation than the weights' own.

    model: the name in `clip.model`; None where the source states the architecture itself.
    """
    computed = bool(architecture.get("quick_gelu", False))
    if stated.quick_gelu is None or stated.quick_gelu == computed:
        return
    trained, other = ("QuickGELU", "GELU") if stated.quick_gelu else ("GELU", "QuickGELU")
    if model is None:
        cure = f'set "quick_gelu" to {str(stated.quick_gelu).lower()} in its model_cfg'
    elif name := architectures.sibling(model, stated.quick_gelu):
        cure = f"set clip.model to {name}"
    else:
        cure = f"open_clip has no {model} with {trained}, so take other weights"
    contradicted(f"{where} was trained with {trained}, but {model or 'its model_cfg'} computes {other}; {cure}", strict)
