"""Score files: counts per shard, such as RUN/scores/SHARD.json, and the scores of their sum, such as RUN/scores-masks.json.

Integers add up to the same sum in any order, so the scores do not depend on the number of jobs.
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
from weakclip.runtime.run_dir import RunDir


@dataclass(frozen=True)
class Scored:
    """Paths of the masks to score, of the counts of their shards, and of their scores."""

    masks: Path
    folder: Path
    whole: Path

    @classmethod
    def pseudo(cls, run: RunDir) -> Scored:
        """Return the paths for a run's pseudo masks."""
        return cls(run.pseudo, run.pseudo_counts, run.scores("masks"))

    @classmethod
    def predicted(cls, run: RunDir, split: str) -> Scored:
        """Return the paths for the masks that a retrained network predicts for a split. run: the network's own run directory."""
        return cls(run.masks(split), run.split_counts(split), run.scores(split))

    def counts(self, shard: str) -> Counts | None:
        """Return a shard's counts; None until it is counted, boundaries included, with the current masks."""
        path = self.folder / f"{shard}.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        if not self._current(found) or "boundary" not in found:  # an earlier version wrote no boundary counts
            return None
        return Counts(np.array(found["counts"], np.int64), np.array(found["boundary"], np.int64))

    def write_counts(self, shard: str, found: Counts) -> None:
        self.folder.mkdir(exist_ok=True)
        counted = {"counts": found.matrix_KK.tolist(), "boundary": found.boundary_K2.tolist()}
        write_whole(
            self.folder / f"{shard}.json", json.dumps({"masks": mask_folder.read_provenance(self.masks), **counted}) + "\n"
        )

    def add_up(self, index: Index) -> Scores | None:
        """Write and return the scores of the whole set; None while a shard is missing. Several jobs may write the same file."""
        found = [self.counts(shard.name) for shard in index.shards if shard.samples]
        counted = [part for part in found if part is not None]
        if len(counted) < len(found):
            return None
        scores = sum(counted, start=Counts.zero(len(index.classes))).scores(index.classes)
        write(scores, mask_folder.read_provenance(self.masks), self.whole)
        return scores

    def done(self, index: Index) -> tuple[int, int]:
        """Return the number of counted shards and of all. The last one counts as done once the sum is written."""
        shards = [shard.name for shard in index.shards if shard.samples]
        counted = sum(self.counts(shard) is not None for shard in shards)
        added_up = counted == len(shards) and self._is_whole()
        return min(counted, len(shards) if added_up else len(shards) - 1), len(shards)

    def _is_whole(self) -> bool:
        """Return whether the sum, boundaries included, is written for the current masks."""
        found = json.loads(self.whole.read_text()) if self.whole.is_file() else {}
        return "boundary_iou" in found and self._current(found)

    def _current(self, found: dict[str, Any]) -> bool:
        """Return whether counts or scores are of the masks that are there now."""
        noted, made_by = found.get("masks"), mask_folder.read_provenance(self.masks)
        return noted is not None and made_by is not None and mask_folder.deciding(noted) == made_by


def write(scores: Scores, made_by: dict[str, Any] | None, path: Path) -> None:
    """Write scores as JSON. made_by: provenance of the scored masks (mask_folder.read_provenance)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({**scores.as_dict(), "masks": made_by}, indent=1) + "\n")
