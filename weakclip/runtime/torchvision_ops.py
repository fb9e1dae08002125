"""A fix for `import torchvision`, which open_clip and timm need, where torchvision's compiled operators are missing.

The torchvision wheel on PyPI is built against the CUDA build of torch. With a CPU-only torch its C++ extension does not load,
and its Python side then fails on import, because it registers fake kernels for two operators that were never declared.
Declaring their schemas is enough: nothing here ever calls them.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def declare_missing() -> None:
    """Declare torchvision's operators if its extension does not load. Call this before `import open_clip` or `import timm`."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        for extension in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(extension))  # as torchvision's own import does a moment later
    except OSError:
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(f"torchvision::{name}", _SCHEMA)
