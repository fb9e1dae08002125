"""Where the weights of a CLIP are stored. Importing this module is light: a login node uses it to tell which CLIP makes CAMs."""

from __future__ import annotations

import re
from pathlib import Path

DEMO = Path(__file__).parents[1] / "assets" / "demo_clip"

HUB = "hf-hub:"
"""What open_clip's names of models on the Hugging Face Hub begin with."""

PREFERRED = ("open_clip_", "model.", "pytorch_model.")
"""How the weights of open_clip and of transformers are called in a directory that may hold other files of these kinds as well."""


def is_name(pretrained: str) -> bool:
    """Return whether `clip.pretrained` names weights that open_clip downloads: "hf-hub:...", or a tag.

    A tag has only letters, digits, "-" and "_". A file or directory of that name comes first, as ./NAME would.
    """
    return pretrained.startswith(HUB) or (re.fullmatch(r"[\w-]+", pretrained) is not None and not place(pretrained).exists())


def place(pretrained: str) -> Path:
    """Return the file or directory that `clip.pretrained` names, whether it exists or not."""
    return DEMO if pretrained == "demo" else Path(pretrained)


def weights_file(path: Path) -> Path | None:
    """Return `path` if it is a file, or the weights in it if it is a directory; None if there are none."""
    if path.is_dir():
        found = [file for suffix in ("safetensors", "pt", "bin") for file in sorted(path.glob(f"*.{suffix}"))]
        preferred = [file for prefix in PREFERRED for file in found if file.name.startswith(prefix)]
        return next(iter(preferred + found), None)
    return path if path.is_file() else None
