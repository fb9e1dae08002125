"""The three training jobs, each with its part of a recipe. One loop trains them all (weakclip.training.loop).

Importing this module is light, since login nodes ask for a job's progress. weakclip.training.tasks has the networks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from weakclip import labels
from weakclip.checkpoints import clip_files
from weakclip.config import (
    AugmentConfig,
    Config,
    ConfigError,
    DataConfig,
    InferenceConfig,
    OptimConfig,
    TrainConfig,
    require_whole_patches,
)
from weakclip.masks.mask_folder import MaskSettings
from weakclip.registry import CAM_SOURCES
from weakclip.runtime.run_dir import RunDir


@dataclass(frozen=True)
class Job:
    """A training job: the unmodified recipe and the settings of this job."""

    name: str
    """Its stage: classify, train or retrain."""
    recipe: Config
    run: RunDir
    """Where its checkpoints, weights and curves go: the recipe's run directory, or one in it."""
    data: DataConfig
    """Its data: `train`, `mix` and `val` are those of this job."""
    augment: AugmentConfig
    optim: OptimConfig
    train: TrainConfig
    inference: InferenceConfig
    """How its network segments images, if it is a segmentation network."""
    fixed: tuple[str, ...]
    """Sections and keys of the recipe that decide the result: a resumed run keeps them, except for claim.MAY_CHANGE."""

    @property
    def names(self) -> tuple[str, ...]:
        """Class list of the recipe."""
        return labels.class_names(self.recipe.classes)

    @property
    def prefix(self) -> str:
        """What its keys `optim` and `train` begin with in the recipe."""
        return "" if self.name == "train" else f"{self.name}."

    @property
    def batch_product(self) -> str:
        """The keys whose product is the global batch, for messages."""
        return f"{self.prefix}train.batch x {self.prefix}train.accumulate x ranks"

    @property
    def mask_settings(self) -> MaskSettings:
        """Settings of the masks that its network writes."""
        return MaskSettings(self.inference, self.data.scale, self.recipe.seeds, self.data.workers)


_ALWAYS = ("seed", "precision", "classes")


def refine(recipe: Config) -> Job:
    """Return the job that trains WeakCLIP on seeds: the stage `train`. Raises ConfigError as `_check_seeds` does."""
    _check_seeds(recipe)
    model = ("clip", "prompts", "adapter", "matching", "decoder", "loss", "boundary")
    cam = ("cam",) if recipe.data.labelled is not None else ()  # else the CAMs are given
    return Job(
        "train",
        recipe,
        recipe.run_dir,
        recipe.data,
        recipe.augment,
        recipe.optim,
        recipe.train,
        recipe.pseudo,
        fixed=(
            *_ALWAYS,
            "demo",
            "data",
            *cam,
            "seeds",
            "augment",
            *model,
            "optim",
            "train",
        ),
    )


def retrain(recipe: Config) -> Job:
    """Return the job that trains a fully supervised segmentation network on the pseudo masks, or on the seeds themselves.

    Raises ConfigError when the recipe names no network.
    """
    ours = recipe.retrain
    if ours.network is None:
        raise ConfigError("retrain.network is null; set it to the network to train on the pseudo masks, such as segformer")
    on_seeds = ours.targets == "seeds"
    if on_seeds:
        _check_seeds(recipe)
    return Job(
        "retrain",
        recipe,
        recipe.run_dir.retrained(ours.network, on_seeds),
        recipe.data,
        ours.augment,
        ours.optim,
        ours.train,
        ours.test,
        fixed=(*_ALWAYS, "data", *(("seeds",) if on_seeds else ()), "retrain"),
    )


def classify(recipe: Config) -> Job:
    """Return the job that trains MCTformer on the image labels of `data.labelled`. Raises ConfigError without such a set."""
    ours = recipe.classify
    if recipe.data.labelled is None or not CAM_SOURCES[recipe.cam.source].classifier:
        raise ConfigError("nothing to classify: set cam.source to mctformer, and data.labelled to the shard set with labels")
    return Job(
        "classify",
        recipe,
        recipe.run_dir.classifier,
        replace(recipe.data, train=recipe.data.labelled, labelled=None, mix={}, val=None),
        ours.augment,
        ours.optim,
        ours.train,
        recipe.pseudo,
        fixed=(*_ALWAYS, "data.labelled", "data.scale", "data.shuffle_window", "classify"),
    )


def _check_seeds(recipe: Config) -> None:
    """Raise ConfigError for a CRF on the seeds in every step, which would take a second per image and epoch."""
    if recipe.seeds.crf is not None and recipe.data.labelled is None:
        raise ConfigError(
            "seeds.crf: the stage cam computes these seeds, but data.labelled is null; set it, or leave seeds.crf out"
        )


def check_crop(job: Job) -> None:
    """Raise ConfigError for a training crop that is no multiple of the patch, where names in the recipe tell the patch.

    Networks whose names do not tell it are checked when they are built. The other networks take any crop.
    """
    patch = None
    if job.name == "train":
        patch = clip_files.patch(job.recipe.clip)
    elif job.name == "classify" and (found := re.search(r"_patch(\d+)", job.recipe.classify.backbone)):
        patch = int(found[1])
    if patch is not None:
        require_whole_patches("augment.crop" if job.name == "train" else "classify.augment.crop", job.augment.crop, patch)


JOBS: dict[str, Callable[[Config], Job]] = {"classify": classify, "train": refine, "retrain": retrain}
"""Functions recipe -> Job, by the name of the stage."""
