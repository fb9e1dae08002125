"""`clip.model` and `clip.pretrained` -> an open_clip model with their weights, never silently a random one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from weakclip.checkpoints import state_dict
from weakclip.config import ClipConfig
from weakclip.models import architectures, sources

_log = logging.getLogger(__name__)


def load_clip(config: ClipConfig, strict: bool = True) -> Any:
    """Return the open_clip.CLIP that `config.model` and `config.pretrained` name.

    Its `architecture` is open_clip's model_cfg; its `normalisation` is the one that it was trained with, None where its source
    does not state it. With `double_class_embedding` its class embedding is twice CLIP's, so that a plain ViT gives the published
    features. (The released code adds the embedding once more. Doubling it is exact and can be undone; the alternative, adding it
    to the class token's position embedding, rounds.)
    Raises ConfigError when a source is missing or unreadable, does not fit the architecture, is not a CLIP that is supported, or,
    if `strict`, contradicts the recipe.
    """
    if config.pretrained == "none":
        model, doubled = architectures.build(architectures.named(config.model), "clip.model"), False
        model.normalisation = None
    else:
        model, doubled = _load(config, strict)
    model.visual.class_embedding.data *= (2 if config.double_class_embedding else 1) / (2 if doubled else 1)
    return model


def _load(config: ClipConfig, strict: bool) -> tuple[Any, bool]:
    """Return the CLIP with its weights, and whether its class embedding is already doubled."""
    path, kind, state, stated, doubled = sources.read(config)
    where = f"clip.pretrained: {path}"
    architecture = architectures.as_large_as(state, stated.architecture or architectures.named(config.model))
    sources.check_activation(stated, architecture, where, config.model, strict)
    model = architectures.build(architecture, "clip.model" if config.model else f"clip.pretrained: {stated.settings}")
    state = unpack_tokens(state, model.token_embedding.num_embeddings)
    state = {"logit_scale": model.logit_scale, **state}  # not used here, and missing in released WeakCLIPs
    state_dict.load_into(model, state, f"{where} ({kind})", "set clip.model to the architecture of these weights")
    if config.model and stated.quick_gelu is None and architecture.get("quick_gelu"):
        _warn_of_activation(path, config.model)
    model.normalisation = stated.normalisation
    return model, doubled


@cache
def _warn_of_activation(path: Path, model: str) -> None:
    """Warn, once in a job, of weights that the default QuickGELU may not fit; a model with GELU was chosen on purpose."""
    other = f": clip.model={name}" if (name := architectures.sibling(model, False)) else ""
    if sources.is_stated_beside(path):
        other += f"; clip.pretrained={path.parent} clip.model=null takes the one that this directory states"
    _log.log(
        logging.INFO if int(os.environ.get("RANK", 0)) else logging.WARNING,
        "clip.pretrained: %s does not state its activation; clip.model=%s computes QuickGELU, as OpenAI's, MetaCLIP's and DFN's "
        "weights need, but most others need GELU%s",
        path,
        model,
        other,
    )


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
