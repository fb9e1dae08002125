"""Where the weights of a CLIP lie. Importing this module is light: a login node asks it what CAMs are made by."""

from __future__ import annotations

from pathlib import Path

DEMO = Path(__file__).parents[1] / "assets" / "demo_clip"


def place(pretrained: str) -> Path:
    """The file or directory that `clip.pretrained` names, whether it is there or not."""
    return DEMO if pretrained == "demo" else Path(pretrained)


def weights_file(path: Path) -> Path | None:
    """The file itself, or the one with the weights in a directory of open_clip's layout; None where there is none."""
    if path.is_dir():
        found = [file for suffix in ("safetensors", "pt", "bin") for file in sorted(path.glob(f"*.{suffix}"))]
        return found[0] if found else None
    return path if path.is_file() else None
