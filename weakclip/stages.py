"""The stages from labels to masks: what each needs, how it runs, and its progress.

A stage is a function of a config and, where it works image by image, of a part of the shards. It can be run again at any time
and does only what is missing. Importing this module is light, since login nodes do so before they submit anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from weakclip import registry
from weakclip.cams import make
from weakclip.config import Config, ConfigError
from weakclip.data.index import Index
from weakclip.datasets import build
from weakclip.evaluation.score_files import Scored
from weakclip.masks import mask_folder
from weakclip.masks.mask_folder import MaskSettings
from weakclip.registry import CAM_SOURCES
from weakclip.runtime.run_dir import RunDir, checkpoint_step
from weakclip.training import jobs
from weakclip.training.claim import require_same_settings
from weakclip.training.jobs import JOBS, check_crop


class Progress(NamedTuple):
    """The amount of a stage that is done."""

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
    """One stage of the chain."""

    name: str
    data: str
    """The shard set that it works on: labelled, train or val."""
    progress: Callable[[Config, Index | None], Progress]
    """(config, training shards or None before they are built) -> progress. Raises ConfigError where results of another config
    are in the way."""
    products: Callable[[Config], dict[str, Path]]
    """config -> what it makes, such as masks, and where."""
    runner: str | None = None
    """Import path of its function (config, part), for a stage whose array of tasks shares the shards; None: one job of ranks that
    train together."""
    gpus: bool = True
    """Whether it can use GPUs."""
    overwrites: bool = False
    """Whether it replaces results of other weights; otherwise they must be removed first."""

    @property
    def ranks(self) -> bool:
        """Whether it is one job of ranks, rather than an array of tasks."""
        return self.runner is None

    def run(self, config: Config, part: str | None) -> None:
        """Do what is missing, on all shards or on `part` ("A:B"). Raises UserError for mistakes of the user."""
        if self.runner is None:
            registry.load("weakclip.train:run")(self.name, config, resume=True)
        else:
            registry.load(self.runner)(config, part)


def _shards_progress(config: Config, _index: Index | None) -> Progress:
    return Progress(*build.written(config), "shards")


def _cam_progress(config: Config, _index: Index | None) -> Progress:
    if config.data.labelled is not None and config.data.build.source:
        images = _shards_progress(config, None)
        if not images.complete:
            return Progress(make.written(config, None), images.total, "shards")
    labelled = make.open_labelled(config)
    return Progress(make.written(config, labelled), len(labelled.shards), "shards")


def _training_progress(name: str, config: Config, _index: Index | None) -> Progress:
    job = JOBS[name](config)
    check_crop(job)
    require_same_settings(job)
    saved = [checkpoint_step(path) for path in job.run.checkpoints()]
    return Progress(max(saved, default=0), job.train.steps, "steps")


def _pseudo_progress(config: Config, index: Index | None) -> Progress:
    folder = config.run_dir.pseudo
    _refuse_others(folder, MaskSettings.of(config), config.run_dir)
    entries = index.entries if index else ()
    missing = mask_folder.missing(folder, entries, config.pseudo.soft)
    return Progress(len(entries) - len(missing), len(entries), "images")


def _refuse_others(folder: Path, settings: MaskSettings, run: RunDir) -> None:
    """Raise ConfigError where masks of other weights than the run's best, or of other settings, are in the way."""
    weights, earlier = run.best_weights(), mask_folder.read_provenance(folder)
    if earlier is not None and (weights is None or earlier != mask_folder.provenance(settings, weights)):
        raise ConfigError(
            f"{folder} holds masks of other weights or settings (see {folder}/about.json); "
            "remove it, or set run to another directory"
        )


def _evaluate_progress(config: Config, index: Index | None) -> Progress:
    return Progress(*(Scored.pseudo(config.run_dir).done(index) if index else (0, 0)), "shards")


def _test_progress(config: Config, _index: Index | None) -> Progress:
    job = jobs.retrain(config)
    if config.data.val is None:
        raise ConfigError("data.val is null; set it to the shard set that the retrained network is tested on")
    place = Scored.predicted(job.run, "val")
    _refuse_others(place.masks, job.mask_settings, job.run)
    return Progress(*place.done(Index.load(config.data.val, config.data)), "shards")


def _training_products(name: str, config: Config) -> dict[str, Path]:
    run = JOBS[name](config).run
    return {"weights": run.best_weights() or run.weights("last")}


def _test_products(config: Config) -> dict[str, Path]:
    place = Scored.predicted(jobs.retrain(config).run, "val")
    return {"masks": place.masks, "scores": place.whole}


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "shards",
            "labelled",
            _shards_progress,
            lambda config: {"shards": Path(config.data.built)},
            "weakclip.datasets.build:run_part",
            gpus=False,
        ),
        Stage("classify", "labelled", partial(_training_progress, "classify"), partial(_training_products, "classify")),
        Stage(
            "cam",
            "labelled",
            _cam_progress,
            lambda config: {"shards with CAMs": Path(config.data.train)},
            "weakclip.cams.make:run",
        ),
        Stage("train", "train", partial(_training_progress, "train"), partial(_training_products, "train")),
        Stage("pseudo", "train", _pseudo_progress, lambda config: {"masks": config.run_dir.pseudo}, "weakclip.pseudo:run_part"),
        Stage("retrain", "train", partial(_training_progress, "retrain"), partial(_training_products, "retrain")),
        Stage("test", "val", _test_progress, _test_products, "weakclip.test:run"),
        Stage(
            "evaluate",
            "train",
            _evaluate_progress,
            lambda config: {"scores": Scored.pseudo(config.run_dir).whole},
            "weakclip.evaluate:run_part",
            gpus=False,
            overwrites=True,
        ),
    )
}
"""Stages by name, in the order of the chain: each needs all before it."""


MAKERS = ("shards", "cam")
"""Stages that write shard sets. The last of them in a chain writes `data.train`. All write the same number of shards."""


def chain(config: Config) -> list[Stage]:
    """Return the stages of a config.

    Shards and CAMs that already exist need no stage, and a network that is trained on seeds needs no WeakCLIP.
    """
    on_seeds = config.retrain.network is not None and config.retrain.targets == "seeds"
    absent = {
        "shards": config.data.build.source is None,
        "classify": config.data.labelled is None or not CAM_SOURCES[config.cam.source].classifier,
        "cam": config.data.labelled is None,
        **dict.fromkeys(("train", "pseudo", "evaluate"), on_seeds),
        "retrain": config.retrain.network is None,
        "test": config.retrain.network is None or config.data.val is None,
    }
    return [stage for stage in STAGES.values() if not absent.get(stage.name)]


def is_made(config: Config) -> bool:
    """Return whether all stages that write `data.train` are complete."""
    return all(stage.progress(config, None).complete for stage in chain(config) if stage.name in MAKERS)
