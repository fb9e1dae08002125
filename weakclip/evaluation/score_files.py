"""Scores of masks: the counts of each shard and their sum's scores, such as RUN/scores/SHARD.json and RUN/scores-masks.json.

Integers add up to the same sum in any order, so any number of jobs gives the scores of one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weakclip.data.index import Index
from weakclip.evaluation.metrics import Counts, Scores
from weakclip.masks import mask_folder
from weakclip.runtime.atomic import write_whole


@dataclass(frozen=True)
class Scored:
    """Where masks lie that are scored, the counts of their shards, and their scores."""

    masks: Path
    folder: Path
    whole: Path

    @classmethod
    def pseudo(cls, run: Path) -> Scored:
        """A run's pseudo masks."""
        return cls(run / "pseudo", run / "scores", run / "scores-masks.json")

    @classmethod
    def predicted(cls, run: Path, split: str) -> Scored:
        """What a retrained network, whose run it is, makes of a split."""
        return cls(run / f"masks-{split}", run / f"counts-{split}", run / f"scores-{split}.json")

    def counts(self, shard: str) -> Counts | None:
        """The shard's counts; None before it is counted, boundaries too, with the masks that are there now."""
        path = self.folder / f"{shard}.json"
        found = json.loads(path.read_text()) if path.is_file() else {"masks": None}
        made_by = mask_folder.read_about(self.masks)
        # An earlier version wrote no boundary.
        if made_by is None or found["masks"] != made_by or "boundary" not in found:
            return None
        return Counts(np.array(found["counts"], np.int64), np.array(found["boundary"], np.int64))

    def write_counts(self, shard: str, found: Counts) -> None:
        self.folder.mkdir(exist_ok=True)
        counted = {"counts": found.matrix_KK.tolist(), "boundary": found.boundary_K2.tolist()}
        write_whole(self.folder / f"{shard}.json", json.dumps({"masks": mask_folder.read_about(self.masks), **counted}) + "\n")

    def add_up(self, index: Index) -> Scores | None:
        """The scores of the whole set, written; None while a shard is missing. Several jobs may write the same."""
        found = [self.counts(shard.name) for shard in index.shards if shard.samples]
        counted = [part for part in found if part is not None]
        if len(counted) < len(found):
            return None
        scores = sum(counted, start=Counts.zero(len(index.classes))).scores(index.classes)
        write(scores, mask_folder.read_about(self.masks), self.whole)
        return scores

    def done(self, index: Index) -> tuple[int, int]:
        """How many shards are counted, and of how many; the last counts as done once the sum is written."""
        shards = [shard.name for shard in index.shards if shard.samples]
        counted = sum(self.counts(shard) is not None for shard in shards)
        added_up = counted == len(shards) and self._is_whole()
        return min(counted, len(shards) if added_up else len(shards) - 1), len(shards)

    def _is_whole(self) -> bool:
        """Whether the sum is written, boundaries too, of the masks that are there now."""
        found = json.loads(self.whole.read_text()) if self.whole.is_file() else {}
        return "boundary_iou" in found and found.get("masks") == mask_folder.read_about(self.masks) is not None


def write(scores: Scores, made_by: dict[str, Any] | None, path: Path) -> None:
    """As JSON. made_by: what the scored masks say of themselves (mask_folder.read_about)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({**scores.as_dict(), "masks": made_by}, indent=1) + "\n")
