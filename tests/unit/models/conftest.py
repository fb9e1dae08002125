"""What tests of several modules of weakclip.models share."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def name_tiny_architectures(tmp_path_factory, tiny_clip) -> Callable[[str, str], None]:
    """Gives the tiny architecture names in open_clip: `name(quick, gelu)`, one for each activation."""
    from weakclip.models.architectures import open_clip

    def name(quick: str, gelu: str) -> None:
        folder = tmp_path_factory.mktemp("architectures")
        architecture = json.loads((tiny_clip / "open_clip_config.json").read_text())["model_cfg"]
        for own, quick_gelu in ((quick, True), (gelu, False)):
            (folder / f"{own}.json").write_text(json.dumps(architecture | {"quick_gelu": quick_gelu}))
            open_clip.add_model_config(folder / f"{own}.json")

    return name
