"""Scores of a run's masks: a confusion matrix for each shard, RUN/scores/SHARD.json, and their sum's IoU, RUN/scores-masks.json.

Integers add up to the same sum in any order, so any number of jobs gives the scores of one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from weakclip import masks
from weakclip.data.shard import Index
from weakclip.files import write_whole
from weakclip.metrics import Scores

WHOLE = "scores-masks.json"


def counts(run: Path, shard: str) -> np.ndarray | None:
    """The shard's confusion matrix, int64 K x K; None before it is counted with the masks that are there now."""
    path = run / "scores" / f"{shard}.json"
    found = json.loads(path.read_text()) if path.is_file() else {"masks": None}
    made_by = masks.read_about(run / "pseudo")
    return np.array(found["counts"], np.int64) if made_by is not None and found["masks"] == made_by else None


def write_counts(run: Path, shard: str, matrix_KK: np.ndarray) -> None:
    (run / "scores").mkdir(exist_ok=True)
    found = {"masks": masks.read_about(run / "pseudo"), "counts": matrix_KK.tolist()}
    write_whole(run / "scores" / f"{shard}.json", json.dumps(found) + "\n")


def add_up(run: Path, index: Index) -> Scores | None:
    """The scores of the whole set, written; None while a shard is missing. Several jobs may come to it, and write the same."""
    found = [counts(run, shard.name) for shard in index.shards if shard.samples]
    whole = [matrix_KK for matrix_KK in found if matrix_KK is not None]
    if len(whole) < len(found):
        return None
    scores = Scores.of(np.sum(whole, axis=0), index.classes)
    write(scores, masks.read_about(run / "pseudo"), run / WHOLE)
    return scores


def are_whole(run: Path) -> bool:
    """Whether the sum is written, of the masks that are there now."""
    path = run / WHOLE
    return path.is_file() and json.loads(path.read_text()).get("masks") == masks.read_about(run / "pseudo") is not None


def write(scores: Scores, made_by: dict[str, Any] | None, path: Path) -> None:
    """As JSON. made_by: what the scored masks say of themselves (masks.read_about)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({**scores.as_dict(), "masks": made_by}, indent=1) + "\n")
