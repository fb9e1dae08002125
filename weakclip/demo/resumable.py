"""The state of a training that may be interrupted and goes on from its last save: one file, removed when the training is done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

SECONDS = 180
"""Between two saves."""


class State:
    """parts: what has a state_dict, by name."""

    def __init__(self, file: Path, parts: Mapping[str, Any]) -> None:
        self.file, self.parts = file, parts
        self.saved = time.monotonic()

    def restore(self) -> dict[str, float]:
        """Bring the parts back to where they were. Returns the numbers saved with them; none where there was no training."""
        if not self.file.is_file():
            return {}
        found = torch.load(self.file, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(found.pop(name))
        return found

    def save(self, **numbers: float) -> None:
        """If it is time to."""
        if time.monotonic() - self.saved > SECONDS:
            partial = self.file.with_suffix(".tmp")
            torch.save({name: part.state_dict() for name, part in self.parts.items()} | numbers, partial)
            partial.replace(self.file)
            self.saved = time.monotonic()

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
