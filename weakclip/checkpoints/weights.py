"""Our own weight files: the trainable part of a network as safetensors, in which equal contents are equal bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from weakclip.checkpoints import state_dict, weight_files
from weakclip.runtime.atomic import write_whole

OTHER_CONFIG = "use the config that these weights were trained with"

Module = TypeVar("Module", bound=nn.Module)


def load_into(model: Module, path: Path) -> Module:
    """Load the weights in `path` into `model`; return it in evaluation mode, on the GPU if there is one.

    Raises ArchiveError when they cannot be read, ConfigError when they do not fit.
    """
    state_dict.load_into(model, weight_files.read(path).tensors, str(path), OTHER_CONFIG)
    return to_inference(model)


def to_inference(model: Module) -> Module:
    """Return `model` in evaluation mode, on the GPU if there is one."""
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def save(model: nn.Module, path: Path, step: int) -> None:
    """Write the trainable part of `model` after `step` steps to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, packed(model.state_dict(), {"format": "pt", "step": str(step)}))


def packed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file. Equal contents give equal bytes, so that a hash of the file identifies the weights.

    (safetensors itself writes the metadata in a random order.)
    """
    data = safetensors.torch.save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, dict(metadata))
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]
