"""Conversion between the released layout of WeakCLIP's checkpoints and ours, and reading and writing both.

"Ours" is one flat dict: the trainable part under this package's names, and the CLIP under open_clip's, prefixed "clip.". Nothing
in a file that is read is executed.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weakclip import labels, recipe
from weakclip.checkpoints import state_dict, weight_files, weights
from weakclip.config import ConfigError, DecoderConfig, MatchingConfig
from weakclip.models.adapter import PyramidAdapter
from weakclip.models.architectures import open_clip
from weakclip.models.decoder import TextGuidedDecoder
from weakclip.models.load import CLASSES, EXTRA_NAMES, load_weakclip
from weakclip.models.matching import CoAttentionMatching
from weakclip.models.sources import ARCHITECTURE, CLASS_EMBEDDING, OPENAIS_METADATA, OPENAIS_NUMBERS, preprocessing
from weakclip.models.weakclip import WeakCLIP
from weakclip.runtime.atomic import write_whole
from weakclip.runtime.run_dir import RunDir

# Prefixes of names, released and ours. The first one that matches is used, so the general ones come last.
PREFIXES = (
    ("contexts", "prompts_ND"),
    ("gamma", "matching.alpha"),
    ("beta", "matching.beta"),
    *((f"backbone.fpn{level}.", f"adapter.level{level}.") for level in (1, 2, 3, 4)),
    ("context_decoder.memory_proj.", "matching.visual_proj."),
    ("context_decoder.text_proj.", "matching.text_proj."),
    ("context_decoder.decoder.", "matching.text_branch.layers."),
    ("context_decoder.anti_decoder.", "matching.visual_branch.layers."),
    ("context_decoder.out_proj.", "matching.text_branch.out."),
    ("context_decoder.anti_out_proj.", "matching.visual_branch.out."),
    *((f"neck.lateral_convs.{level}.conv.", f"decoder.neck.laterals.{level}.") for level in range(4)),
    *((f"neck.fpn_convs.{level}.conv.", f"decoder.neck.outputs.{level}.") for level in range(4)),
    *(
        (f"decode_head.scale_heads.{level}.{2 * i}.{part}.", f"decoder.head.scales.{level}.{i}.{index}.")
        for level in range(4)
        for i in range(max(1, level))
        for index, part in enumerate(("conv", "bn"))
    ),
    ("decode_head.conv_seg.", "decoder.head.classify."),
    ("backbone.", "clip.visual."),
    ("text_encoder.", "clip."),
)

UNUSED = {
    "identity_head.": "the auxiliary loss has no weights here",
    "auxiliary_head.": "not part of the published recipe",
}
"""Prefixes of released names that have no counterpart in ours, and why."""


def our_name(released: str) -> str | None:
    """Return our name of a released tensor, or None."""
    return next((ours + released[len(theirs) :] for theirs, ours in PREFIXES if released.startswith(theirs)), None)


def released_name(ours: str) -> str | None:
    """Return the released name of one of our tensors, or None."""
    return next((theirs + ours[len(own) :] for theirs, own in PREFIXES if ours.startswith(own)), None)


def from_released(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the released layout to ours. The class embedding is doubled, because the released code adds it twice."""
    ours = {name: tensor for theirs, tensor in tensors.items() if (name := our_name(theirs))}
    ours["prompts_ND"] = ours["prompts_ND"][0]
    ours["clip.visual.class_embedding"] = 2 * ours["clip.visual.class_embedding"]
    return ours


def to_released(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert ours to the released layout: the exact inverse of `from_released`."""
    tensors = {theirs: tensor for name, tensor in ours.items() if (theirs := released_name(name))}
    tensors["contexts"] = tensors["contexts"][None]
    tensors["backbone.class_embedding"] = tensors["backbone.class_embedding"] / 2
    return tensors


def cut_coco(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a COCO model over 91 raw ids to one over 81 classes, with unchanged logits.

    Only the head is cut. The ten names that no annotation uses take part in the co-attention and guide the decoder, so they are
    kept after the classes, as `matching.extra_names`.
    """
    order = torch.tensor(labels.COCO_RAW_IDS)
    head = {name: ours[name][order[: len(labels.COCO)]] for name in _head(ours)}
    return {**ours, **head, **_reorder(ours, order)}


def uncut_coco(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert back what `cut_coco` converted; the ten unused classes get a logit of -10,000."""
    order = torch.tensor(labels.COCO_RAW_IDS)
    head = {}
    for name in _head(ours):
        gaps = ours[name].new_full((len(labels.COCO_GAP_NAMES), *ours[name].shape[1:]), -1e4 if name.endswith("bias") else 0)
        head[name] = torch.cat([ours[name], gaps])[order.argsort()]
    return {**ours, **head, **_reorder(ours, order.argsort())}


def _head(ours: Mapping[str, Tensor]) -> list[str]:
    return [name for name in ours if name.startswith("decoder.head.classify.")]


def _reorder(ours: Mapping[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """Return the lateral convs with the columns of the score map, which follow those of the features, in another order."""
    names = [name for name in ours if name.startswith("decoder.neck.laterals.") and name.endswith("weight")]
    features = len(ours["adapter.level3.weight"])
    return {name: torch.cat([ours[name][:, :features], ours[name][:, features:][:, order]], dim=1) for name in names}


def architecture(ours: Mapping[str, Tensor], vision_heads: int, text_heads: int) -> dict[str, Any]:
    """Return open_clip's model_cfg of the CLIP in `ours`. The shapes determine everything but the numbers of heads."""
    width, _, patch, _ = ours["clip.visual.conv1.weight"].shape
    vocabulary, text_width = ours["clip.token_embedding.weight"].shape
    side = round((len(ours["clip.visual.positional_embedding"]) - 1) ** 0.5)
    vision = {"image_size": side * patch, "layers": _count(ours, "clip.visual.transformer.resblocks."), "width": width}
    text = {"context_length": len(ours["clip.positional_embedding"]), "vocab_size": vocabulary, "width": text_width}
    return {
        "embed_dim": ours["clip.visual.proj"].shape[1],
        "quick_gelu": True,
        "vision_cfg": {**vision, "patch_size": patch, "head_width": width // vision_heads},
        "text_cfg": {**text, "heads": text_heads, "layers": _count(ours, "clip.transformer.resblocks.")},
    }


def _count(ours: Mapping[str, Tensor], prefix: str) -> int:
    found = [re.match(re.escape(prefix) + r"(\d+)\.", name) for name in ours]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def expected(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a complete checkpoint of these sizes holds: our names, with tensors on the meta device."""
    cfg = architecture(ours, 1, 1)
    width, embedding = cfg["vision_cfg"]["width"], cfg["embed_dim"]
    inner, layers = len(ours["matching.visual_proj.1.bias"]), _count(ours, "matching.text_branch.layers.")
    laterals, head = ours["decoder.neck.laterals.0.weight"].shape, ours["decoder.head.classify.weight"].shape
    with torch.device("meta"):
        parts = {
            "clip.": open_clip.CLIP(**cfg),
            "adapter.": PyramidAdapter(width),
            "matching.": CoAttentionMatching(embedding, MatchingConfig(inner, layers, heads=1)),
            "decoder.": TextGuidedDecoder(width, laterals[1] - width, head[0], DecoderConfig(laterals[0], head[1])),
        }
        names = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.state_dict().items()}
        names["prompts_ND"] = torch.empty(len(ours["prompts_ND"]), cfg["text_cfg"]["width"])
    del names["clip.logit_scale"]  # not used, and in no released checkpoint
    return names


# Tensors from which `expected` takes sizes, with their number of dimensions.
_SIZES = {
    "contexts": 3,
    "backbone.class_embedding": 1,
    "backbone.conv1.weight": 4,
    "backbone.positional_embedding": 2,
    "backbone.proj": 2,
    "backbone.fpn3.weight": 1,
    "text_encoder.token_embedding.weight": 2,
    "text_encoder.positional_embedding": 2,
    "context_decoder.memory_proj.1.bias": 1,
    "neck.lateral_convs.0.conv.weight": 4,
    "decode_head.conv_seg.weight": 4,
}


def read_released(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Convert a released checkpoint to ours. Raises ConfigError unless it is complete and has no unexpected keys."""
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(UNUSED))}
    if lacking := [name for name, ndim in _SIZES.items() if name not in tensors or tensors[name].ndim != ndim]:
        raise ConfigError(f"{source}: not a released WeakCLIP on a ViT; missing keys: {state_dict.some(lacking)}")
    ours = from_released(tensors)
    _check_depth(architecture(ours, 1, 1), source)
    state_dict.check_fit(to_released(expected(ours)), tensors, source, "use a checkpoint of the released WeakCLIP on a ViT")
    return ours


def _check_depth(cfg: dict[str, Any], source: str) -> None:
    """Raise ConfigError for a tower of OpenAI's sizes but another depth: a missing last block would otherwise go unnoticed."""
    for name in ("ViT-B-16-quickgelu", "ViT-L-14-quickgelu"):
        known = open_clip.get_model_config(name)
        if all(cfg["vision_cfg"][size] == known["vision_cfg"][size] for size in ("width", "patch_size")):
            for tower in ("vision", "text"):
                found, wanted = cfg[f"{tower}_cfg"]["layers"], known[f"{tower}_cfg"]["layers"]
                if found != wanted:
                    raise ConfigError(f"{source}: {found} {tower} blocks, but {name} has {wanted}; it is incomplete")


def parameters(model: WeakCLIP) -> dict[str, nn.Parameter]:
    """Return all parameters of a model under our names, including its CLIP's."""
    clip = {
        f"clip.{prefix}{name.replace('blocks.', 'transformer.resblocks.', 1)}": parameter
        for prefix, tower in (("visual.", model.clip.vision), ("", model.clip.text))
        for name, parameter in tower.named_parameters()
    }
    return {**dict(model.named_parameters()), **clip}


def of_model(model: WeakCLIP) -> dict[str, Tensor]:
    """Return the layout ours of a model. Position embeddings have the size in which the model uses them."""
    return {**{name: parameter.detach() for name, parameter in parameters(model).items()}, **model.state_dict()}


class Checkpoint(NamedTuple):
    """A checkpoint in our layout."""

    ours: dict[str, Tensor]
    meta: dict[str, str]
    """Metadata of a safetensors file: model_cfg, class_embedding, classes, extra_names."""
    notes: tuple[str, ...] = ()
    """What was not used or was changed, and why: lines for the person who converts."""


def read(path: Path, classes: str | None = None) -> Checkpoint:
    """Read a released checkpoint, OpenAI's archive of a CLIP, a run directory or a file that `write` wrote.

    classes: as `classes` in a recipe; needed when K is neither that of VOC nor that of COCO.
    Raises ConfigError or ArchiveError when it is none of these, damaged or incomplete, or has unexpected keys.
    """
    if path.is_dir():
        return _read_run(path)
    tensors, meta = weight_files.read(path)
    if "clip.visual.class_embedding" in tensors and "prompts_ND" in tensors:
        return Checkpoint(tensors, meta)
    if "visual.class_embedding" in tensors:
        numbers = [name for name in OPENAIS_NUMBERS if name in tensors]
        clip = {name: tensor for name, tensor in tensors.items() if name not in numbers}
        about = {"format": "pt", **(OPENAIS_METADATA if len(numbers) == len(OPENAIS_NUMBERS) else {})}
        return Checkpoint(clip, about, (f"not used: {', '.join(numbers)}: the shapes determine these numbers",))
    if "prompts_ND" in tensors:
        raise ConfigError(f"{path}: a run's trainable part without its CLIP; give the run directory instead")
    ours = read_released(tensors, str(path))
    notes = [f"not used: {name}: {why}" for name in tensors for start, why in UNUSED.items() if name.startswith(start)]
    notes.append("class embedding: doubled, because the released code adds it to the class token twice")
    K = len(ours["decoder.head.classify.weight"])
    extra_names: tuple[str, ...] = ()
    names = labels.class_names(classes or {21: "voc", 91: "coco"}.get(K) or _which_classes(path, K))
    if names == labels.COCO and len(labels.COCO_RAW_IDS) == K:
        ours, extra_names = cut_coco(ours), labels.COCO_GAP_NAMES
        notes.append(f"head: cut from 91 raw ids to 81 classes; still matched, never predicted: {', '.join(extra_names)}")
    elif len(names) != K:
        raise ConfigError(f"{path}: made for {K} classes, but --classes names {len(names)}")
    heads = [max(1, len(ours[f"clip.{name}"]) // 64) for name in ("visual.class_embedding", "ln_final.weight")]
    return Checkpoint(ours, metadata(architecture(ours, *heads), True, names, extra_names), tuple(notes))


def _which_classes(path: Path, K: int) -> str:
    raise ConfigError(f"{path}: {K} classes are neither VOC's 21 nor COCO's 91; name them with --classes FILE, one per line")


def _read_run(folder: Path) -> Checkpoint:
    config = recipe.load_saved(RunDir(folder))
    model = load_weakclip(config, RunDir(folder).find_weights("best")).cpu()
    names = labels.class_names(config.classes)
    meta = metadata(model.clip.architecture, config.clip.double_class_embedding, names, config.matching.extra_names)
    return Checkpoint(of_model(model), {**meta, **preprocessing(model.clip.trained_with)})


def metadata(cfg: dict[str, Any], doubled: bool, names: Sequence[str], extra_names: Sequence[str]) -> dict[str, str]:
    """Return a checkpoint's metadata. cfg: open_clip's model_cfg. doubled: whether its class embedding is twice CLIP's."""
    lists = {CLASSES: json.dumps(names), EXTRA_NAMES: json.dumps(extra_names)}
    return {"format": "pt", ARCHITECTURE: json.dumps(cfg), CLASS_EMBEDDING: "doubled" if doubled else "single", **lists}


def write(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint as safetensors in our layout, or else in the released layout (.pth, as mmcv saves it)."""
    ours, meta, _ = checkpoint
    if path.suffix == ".safetensors":
        data = weights.packed(ours, meta)
    elif "prompts_ND" not in ours:
        raise ConfigError(f"{path}: the released layout cannot hold a CLIP alone; write it as .safetensors")
    elif tower := json.loads(meta.get(ARCHITECTURE, "{}")).get("vision_cfg", {}).get("timm_model_name"):
        raise ConfigError(f"{path}: the released layout cannot hold timm's {tower}; write it as .safetensors")
    else:
        names = json.loads(meta[CLASSES])
        if tuple(json.loads(meta[EXTRA_NAMES])) == labels.COCO_GAP_NAMES:
            ours, names = uncut_coco(ours), raw_coco_names()
        flat = labels.palette(len(names))
        about = {"CLASSES": names, "PALETTE": [flat[i : i + 3] for i in range(0, len(flat), 3)]}
        buffer = io.BytesIO()
        torch.save({"meta": about, "state_dict": to_released(ours)}, buffer)
        data = buffer.getvalue()
    write_whole(path, data)


def raw_coco_names() -> list[str]:
    """Return COCO's 91 names in the order of the raw ids."""
    pairs = zip(labels.COCO_RAW_IDS, labels.COCO + labels.COCO_GAP_NAMES, strict=True)
    return [name for _, name in sorted(pairs)]


def summary(ours: Mapping[str, Tensor]) -> str:
    """Return lines that say how many tensors of each part were used, and how many of them have no effect."""
    parts = Counter(
        "vision tower" if name.startswith("clip.visual.") else "text tower" if name.startswith("clip.") else name.split(".")[0]
        for name in ours
    )
    lines = [f"used: {len(ours)} tensors: " + ", ".join(f"{count} {part}" for part, count in parts.items())]
    last = f".layers.{_count(ours, 'matching.text_branch.layers.') - 1}."
    if dead := sum("_branch.layers." in name and last not in name for name in ours):
        lines.append(f"without effect: {dead} of these, the co-attention's layers before the last (matching.chained: false)")
    return "\n".join(lines)
