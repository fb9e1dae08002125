"""Where the weights of a CLIP are stored. Importing this module is light: a login node uses it to tell which CLIP makes CAMs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from weakclip import labels
from weakclip.config import ClipConfig

OPEN_CLIP = "open_clip_config.json"
"""The file with the architecture in a directory of open_clip's layout."""

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


def words_unknown_to_the_demo(config: ClipConfig, names: Sequence[str]) -> str | None:
    """Return what is wrong if `config` is the CLIP that ships and it has never seen a word of `names`, class names; else None."""
    unknown = [name for name in names if name not in (labels.DEMO[0], *labels.DEMO_WORDS)]
    if config.pretrained != "demo" or not unknown:
        return None
    return (
        f"clip.pretrained=demo: this CLIP knows the words of the demo's synthetic world only, not {unknown[0]!r}; for photos set "
        "clip.pretrained to weights such as OpenAI's weights/ViT-B-16.pt, and clip.model to their architecture"
    )


def patch(config: ClipConfig) -> int | None:
    """Return the vision tower's patch, in pixels; None where neither the model's name nor a directory's settings tell it."""
    if config.model is not None:
        found = re.match(r"ViT-[A-Za-z]+-(\d+)", config.model)
        return int(found[1]) if found else None
    try:
        return int(json.loads((place(config.pretrained) / OPEN_CLIP).read_text())["model_cfg"]["vision_cfg"]["patch_size"])
    except (OSError, ValueError, KeyError, TypeError):  # loading the CLIP names the mistake
        return None


def weights_file(path: Path) -> Path | None:
    """Return `path` if it is a file, or the weights in it if it is a directory; None if there are none."""
    if path.is_dir():
        found = [file for suffix in ("safetensors", "pt", "bin") for file in sorted(path.glob(f"*.{suffix}"))]
        preferred = [file for prefix in PREFERRED for file in found if file.name.startswith(prefix)]
        return next(iter(preferred + found), None)
    return path if path.is_file() else None
