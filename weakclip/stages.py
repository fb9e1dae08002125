"""The stages of the way from labels to masks: what each needs, how it runs, and how far it is.

A stage is a function of a config and, where it works image by image, a part of the shards. It can be run again at any time and
does what is missing. Importing this module is light: a login node asks it before anything is submitted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from weakclip import masks
from weakclip import run as runs
from weakclip.config import Config, ConfigError
from weakclip.data.shard import Index


class Progress(NamedTuple):
    done: int
    total: int
    unit: str

    @property
    def complete(self) -> bool:
        return self.done >= self.total

    def __str__(self) -> str:
        return f"{self.done}/{self.total} {self.unit}"


@dataclass(frozen=True)
class Stage:
    """kind: "ranks" that work together, an "array" of tasks with a slice of the shards each, or "one" process.

    run: does the stage on a config and, in an array, on the shards "A:B". Raises ValueError for what the user can mend.
    progress: of a config on its training shards. Raises ConfigError where products of another config are in the way.
    """

    name: str
    kind: Literal["ranks", "array", "one"]
    run: Callable[[Config, str | None], None]
    progress: Callable[[Config, Index], Progress]


def best_weights(run: Path) -> Path | None:
    """Those on the best validation, or the last where there is no validation; None before there are any."""
    files = (run / "weights" / name for name in ("best.safetensors", "last.safetensors"))
    return next((path for path in files if path.is_file()), None)


def _train(config: Config, _part: str | None) -> None:
    from weakclip import train

    train.run(config, resume=True)


def _train_progress(config: Config, _index: Index) -> Progress:
    runs.check_same(config)
    saved = [runs.checkpoint_step(path) for path in runs.checkpoints(Path(config.run))]
    return Progress(max(saved, default=0), config.train.steps, "steps")


def _pseudo(config: Config, part: str | None) -> None:
    from weakclip import pseudo, weights

    pseudo.run(config, config.data.train, weights.find(config, "best"), _masks(config), part)


def _pseudo_progress(config: Config, index: Index) -> Progress:
    folder, weights = _masks(config), best_weights(Path(config.run))
    earlier = masks.read_about(folder)
    if earlier is not None and (weights is None or earlier != masks.about(config, weights)):
        raise ConfigError(
            f"{folder} holds masks of other weights or options (see {folder}/about.json); remove it or set run anew"
        )
    return Progress(len(index.entries) - len(masks.missing(folder, index.entries)), len(index.entries), "images")


def _evaluate(config: Config, _part: str | None) -> None:
    from weakclip import evaluate

    scores = evaluate.run(config, "masks", config.data.train, None, _masks(config))
    evaluate.write(scores, masks.read_about(_masks(config)), _scores(config))
    print(scores.table())


def _evaluate_progress(config: Config, index: Index) -> Progress:
    """The scores stand when they are of the masks that are there now."""
    made_by = masks.read_about(_masks(config))
    scored = json.loads(_scores(config).read_text()) if _scores(config).is_file() else {}
    current = made_by is not None and scored.get("masks") == made_by
    return Progress(len(index.entries) if current else 0, len(index.entries), "images")


def _masks(config: Config) -> Path:
    return Path(config.run) / "pseudo"


def _scores(config: Config) -> Path:
    return Path(config.run) / "scores-masks.json"


STAGES = {
    stage.name: stage
    for stage in (
        Stage("train", "ranks", _train, _train_progress),
        Stage("pseudo", "array", _pseudo, _pseudo_progress),
        Stage("evaluate", "one", _evaluate, _evaluate_progress),
    )
}
"""In the order of the chain: each needs all before it."""
