from __future__ import annotations

from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    """140 real COCO images in the 2014 layout, when they lie beside the repository."""
    path = REPO.parent / "shared/data/coco_mini"
    if not path.is_dir():
        pytest.skip(f"no COCO images at {path}")
    return path
