"""Where the weights of a CLIP are stored. Importing this module is light: a login node uses it to tell which CLIP makes CAMs."""

from __future__ import annotations

from pathlib import Path

DEMO = Path(__file__).parents[1] / "assets" / "demo_clip"


def place(pretrained: str) -> Path:
    """Return the file or directory that `clip.pretrained` names, whether it exists or not."""
    return DEMO if pretrained == "demo" else Path(pretrained)


def weights_file(path: Path) -> Path | None:
    """Return `path` if it is a file, or the weights in it if it is a directory of open_clip's layout; None if there are none."""
    if path.is_dir():
        found = [file for suffix in ("safetensors", "pt", "bin") for file in sorted(path.glob(f"*.{suffix}"))]
        return found[0] if found else None
    return path if path.is_file() else None
