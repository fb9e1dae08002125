"""The stages of the way from labels to masks: what each needs, how it runs, and how far it is.

A stage is a function of a config and, where it works image by image, a part of the shards. It can be run again at any time and
does what is missing. Importing this module is light: a login node asks it before anything is submitted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from weakclip.config import Config, ConfigError
from weakclip.data.index import Index
from weakclip.datasets import writing
from weakclip.evaluation.score_files import Scored
from weakclip.masks import mask_folder
from weakclip.runtime import run_dir as runs
from weakclip.training.jobs import TASKS, Retrain


class Progress(NamedTuple):
    done: int
    total: int
    unit: str

    @property
    def complete(self) -> bool:
        return self.done >= self.total

    def __str__(self) -> str:
        return f"{self.done}/{self.total} {self.unit}"


Run = Callable[[Config, "str | None"], None]
Counted = Callable[[Config, "Index | None"], Progress]


@dataclass(frozen=True)
class Stage:
    name: str
    ranks: bool
    """One job of ranks that work together; else an array of tasks, with a slice of the shards each."""
    gpus: bool
    """It has use for them."""
    data: str
    """The shard set that it works on: labelled, train or val."""
    overwrites: bool
    """It replaces what it made of other weights; else that must be removed first."""
    run: Run
    """Does it, on a config and, in an array, on the shards "A:B". Raises ValueError for what the user can mend."""
    progress: Counted
    """Of a config on its training shards, None before they are built. Raises ConfigError where products of another config are
    in the way."""


def best_weights(run: Path) -> Path | None:
    """Those on the best validation, or the last where there is no validation; None before there are any."""
    files = (run / "weights" / name for name in ("best.safetensors", "last.safetensors"))
    return next((path for path in files if path.is_file()), None)


def _shards(config: Config, part: str | None) -> None:
    from weakclip.data.index import select_numbers
    from weakclip.datasets import build

    options = build.of_recipe(config)
    if not _shards_progress(config, None).complete:
        plan = build.plan(options)
        plan.run(options.processes, select_numbers(plan.shards, part, config.labelled))


def _shards_progress(config: Config, _index: Index | None) -> Progress:
    from weakclip.datasets import build

    if not config.data.build:
        raise ConfigError("data.build is empty: it says what the shards are made of, such as [voc, --devkit, DIR, ...]")
    options = build.of_recipe(config)
    key = "data.train" if config.cam.data is None else "cam.data"
    found = writing.written(Path(config.labelled), build.about(options), key, "data.build")
    return Progress(*(found or (0, build.plan(options).shards)), "shards")


def _cam(config: Config, part: str | None) -> None:
    from weakclip import cam

    cam.run(config, part)


def _cam_progress(config: Config, _index: Index | None) -> Progress:
    from weakclip import cam

    if config.cam.data is not None and config.data.build:
        pictures = _shards_progress(config, None)
        if not pictures.complete:
            return Progress(cam.written(config, None), pictures.total, "shards")
    labelled = cam.open_labelled(config)
    return Progress(cam.written(config, labelled), len(labelled.shards), "shards")


def _train(name: str, config: Config, _part: str | None) -> None:
    from weakclip import train

    train.run(TASKS[name](config), resume=True)


def _train_progress(name: str, config: Config, _index: Index | None) -> Progress:
    task = TASKS[name](config)
    runs.check_same(task.config, task.fixed)
    saved = [runs.checkpoint_step(path) for path in runs.checkpoints(task.run)]
    return Progress(max(saved, default=0), task.config.train.steps, "steps")


def training(name: str, data: str) -> Stage:
    """The stage of a task."""
    run, progress = partial(_train, name), partial(_train_progress, name)
    return Stage(name, ranks=True, gpus=True, data=data, overwrites=False, run=run, progress=progress)


def making(name: str, data: str, run: Run, progress: Counted, gpus: bool = True, overwrites: bool = False) -> Stage:
    """A stage that works image by image."""
    return Stage(name, ranks=False, gpus=gpus, data=data, overwrites=overwrites, run=run, progress=progress)


def _pseudo(config: Config, part: str | None) -> None:
    from weakclip import pseudo
    from weakclip.checkpoints import weights

    pseudo.run(config, config.data.train, weights.find(config, "best"), _masks(config), part)


def _pseudo_progress(config: Config, index: Index | None) -> Progress:
    folder = _masks(config)
    _refuse_others(folder, config)
    entries = index.entries if index else ()
    return Progress(len(entries) - len(mask_folder.missing(folder, entries, config.pseudo.soft)), len(entries), "images")


def _refuse_others(folder: Path, config: Config) -> None:
    """Raises ConfigError where masks of other weights than the run's best, or of other options, are in the way."""
    weights, earlier = best_weights(Path(config.run)), mask_folder.read_about(folder)
    if earlier is not None and (weights is None or earlier != mask_folder.about(config, weights)):
        raise ConfigError(
            f"{folder} holds masks of other weights or options (see {folder}/about.json); remove it or set run anew"
        )


def _evaluate(config: Config, part: str | None) -> None:
    from weakclip import evaluate

    evaluate.run_part(config, part)


def _evaluate_progress(config: Config, index: Index | None) -> Progress:
    return Progress(*(Scored.pseudo(Path(config.run)).done(index) if index else (0, 0)), "shards")


def _test(config: Config, part: str | None) -> None:
    from weakclip import test

    test.run(config, part)


def _test_progress(config: Config, _index: Index | None) -> Progress:
    task = Retrain(config)
    if config.data.val is None:
        raise ConfigError("data.val is null: it names the shard set that the retrained network is tested on")
    place = Scored.predicted(task.run, "val")
    _refuse_others(place.masks, task.config)
    return Progress(*place.done(Index.load(config.data.val, config.data)), "shards")


def _masks(config: Config) -> Path:
    return Path(config.run) / "pseudo"


STAGES = {
    stage.name: stage
    for stage in (
        making("shards", "labelled", _shards, _shards_progress, gpus=False),
        training("classify", "labelled"),
        making("cam", "labelled", _cam, _cam_progress),
        training("train", "train"),
        making("pseudo", "train", _pseudo, _pseudo_progress),
        training("retrain", "train"),
        making("test", "val", _test, _test_progress),
        making("evaluate", "train", _evaluate, _evaluate_progress, gpus=False, overwrites=True),
    )
}
"""In the order of the chain: each needs all before it."""


MAKERS = ("shards", "cam")
"""Stages that make shard sets, the last of which in a chain makes `data.train`. All have as many shards as it."""


def chain(config: Config) -> list[Stage]:
    """All stages that a config has: shards and CAMs that are there already need not be made, and a network that is trained on
    seeds needs no WeakCLIP."""
    on_seeds = config.retrain.network is not None and config.retrain.targets == "seeds"
    absent = {
        "shards": not config.data.build,
        "classify": config.cam.data is None or config.cam.source != "mctformer",
        "cam": config.cam.data is None,
        **dict.fromkeys(("train", "pseudo", "evaluate"), on_seeds),
        "retrain": config.retrain.network is None,
        "test": config.retrain.network is None or config.data.val is None,
    }
    return [stage for stage in STAGES.values() if not absent.get(stage.name)]


def is_made(config: Config) -> bool:
    """Whether nothing is missing any more in `data.train` of what stages make of it."""
    return all(stage.progress(config, None).complete for stage in chain(config) if stage.name in MAKERS)
