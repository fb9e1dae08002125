"""Scores of a run's masks: the counts of each shard, RUN/scores/SHARD.json, and their sum's scores, RUN/scores-masks.json.

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
from weakclip.metrics import Counts, Scores

WHOLE = "scores-masks.json"


def counts(run: Path, shard: str) -> Counts | None:
    """The shard's counts; None before it is counted, boundaries too, with the masks that are there now."""
    path = run / "scores" / f"{shard}.json"
    found = json.loads(path.read_text()) if path.is_file() else {"masks": None}
    made_by = masks.read_about(run / "pseudo")
    # An earlier version wrote no boundary.
    if made_by is None or found["masks"] != made_by or "boundary" not in found:
        return None
    return Counts(np.array(found["counts"], np.int64), np.array(found["boundary"], np.int64))


def write_counts(run: Path, shard: str, found: Counts) -> None:
    (run / "scores").mkdir(exist_ok=True)
    counted = {"counts": found.matrix_KK.tolist(), "boundary": found.boundary_K2.tolist()}
    write_whole(run / "scores" / f"{shard}.json", json.dumps({"masks": masks.read_about(run / "pseudo"), **counted}) + "\n")


def add_up(run: Path, index: Index) -> Scores | None:
    """The scores of the whole set, written; None while a shard is missing. Several jobs may come to it, and write the same."""
    found = [counts(run, shard.name) for shard in index.shards if shard.samples]
    whole = [part for part in found if part is not None]
    if len(whole) < len(found):
        return None
    scores = sum(whole, start=Counts.zero(len(index.classes))).scores(index.classes)
    write(scores, masks.read_about(run / "pseudo"), run / WHOLE)
    return scores


def are_whole(run: Path) -> bool:
    """Whether the sum is written, boundaries too, of the masks that are there now."""
    path = run / WHOLE
    found = json.loads(path.read_text()) if path.is_file() else {}
    return "boundary_iou" in found and found.get("masks") == masks.read_about(run / "pseudo") is not None


def write(scores: Scores, made_by: dict[str, Any] | None, path: Path) -> None:
    """As JSON. made_by: what the scored masks say of themselves (masks.read_about)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({**scores.as_dict(), "masks": made_by}, indent=1) + "\n")
