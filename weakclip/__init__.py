"""From image-level labels to segmentation masks: WeakCLIP as a distributed training job (docs/architecture.md).

From Python, `weakclip.load(RUN).predict(image)` segments an image (weakclip.api).
"""

from __future__ import annotations

from typing import Any

__all__ = ["Prediction", "Segmenter", "load"]


def __getattr__(name: str) -> Any:
    """Import the interface when it is used: commands that need no torch must not load it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from weakclip import api

    return getattr(api, name)
