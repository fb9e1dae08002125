"""The state of a resumable training: one file, removed when the training is done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

SECONDS = 180
"""Minimum time between two saves."""


class State:
    """Saved state of a training. parts: objects with a state_dict, by name."""

    def __init__(self, file: Path, parts: Mapping[str, Any]) -> None:
        self.file, self.parts = file, parts
        self.saved = time.monotonic()

    def restore(self) -> dict[str, float]:
        """Restore the parts, and return the numbers saved with them; {} without a file."""
        if not self.file.is_file():
            return {}
        found = torch.load(self.file, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(found.pop(name))
        return found

    def save(self, **numbers: float) -> None:
        """Save the parts and numbers, if SECONDS have passed since the last save."""
        if time.monotonic() - self.saved > SECONDS:
            partial = self.file.with_suffix(".tmp")
            torch.save({name: part.state_dict() for name, part in self.parts.items()} | numbers, partial)
            partial.replace(self.file)
            self.saved = time.monotonic()

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
