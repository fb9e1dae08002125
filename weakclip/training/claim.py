"""Claiming a run directory: a job starts in an empty one, or resumes a run that has the same settings and data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

from weakclip import recipe as recipes
from weakclip.config import ConfigError
from weakclip.runtime.atomic import write_whole
from weakclip.runtime.run_dir import RunDir
from weakclip.training.jobs import Job, check_crop

MAY_CHANGE = (
    # Where and how fast it is computed. The batch changes with the number of ranks alone (`require_same_batch`).
    "boundary.engine",
    "train.batch",
    "train.accumulate",
    "train.deepspeed",
    "train.compile",
    "data.workers",
    "data.cache",
    "data.cache_gib",
    "data.retries",
    "data.timeout",
    "data.max_bad_samples",
    # What is validated on, and what CAMs and the classifier are made from: a training sees neither, or its contents are compared.
    "data.val",
    "data.labelled",
    # What is logged, shown and saved.
    "train.log_every",
    "train.validate_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.pictures",
    # What happens before and after this training. The shards are compared by their contents (`claim_data`).
    "data.build",
    "retrain.test",
)
"""Keys in the sections of `Job.fixed` that may change when a run is resumed. For the classifier and the retrained network,
"train" means `classify.train` and `retrain.train`."""


def claim(job: Job, resume: bool) -> None:
    """Create the job's run directory with the resolved recipe in it.

    Raises ConfigError when it holds files that belong to no run, a run without `resume`, or a run with other settings, and for a
    crop that is no multiple of the patch.
    """
    check_crop(job)
    run = job.run
    if run.root.exists() and not run.root.is_dir():
        raise ConfigError(f"run: {run} is a file; set run to a directory")
    if run.root.is_dir() and any(not _may_come_first(path) for path in run.root.iterdir()):
        if not run.config.is_file():
            raise ConfigError(f"run: {run} holds files that belong to no run; set run to another directory")
        if not resume:
            raise ConfigError(f"run: {run} already holds a run; resume it with --resume auto, or set run to another directory")
        require_same_settings(job)
    run.root.mkdir(parents=True, exist_ok=True)
    recipes.save(job.recipe, run.config)


def _may_come_first(path: Path) -> bool:
    """Return whether a path may exist before training: from sweeps, jobs, the classifier or scored CAMs."""
    return path.name in ("sweeps", "jobs", "scores", "classify", "shards") or path.name.startswith("scores-")


def require_same_settings(job: Job) -> None:
    """Raise ConfigError when the run directory holds a run that was started with other settings, except for MAY_CHANGE.

    Its config.yaml would otherwise describe a run that never was. The message names each key with its earlier and its new value.
    """
    if not job.run.config.is_file():
        return
    earlier = recipes.load_saved(job.run)
    if job.name == "classify" and earlier.data.labelled is None:  # in earlier versions the labelled set was `train`
        earlier.data.labelled = earlier.data.train
    changed = [
        f"{key}: {_text(before)} -> {_text(now)}"
        for key, before, now in _differences(asdict(earlier), asdict(job.recipe))
        if _decides(key, job.fixed)
    ]
    if changed:
        raise ConfigError(
            f"run: {job.run} was started with other settings ({', '.join(changed)}); keep those of {job.run.config}, or start "
            "another run with run=NEW; docs/settings.md lists the keys that may change"
        )


def require_same_batch(job: Job, ranks: int) -> None:
    """Raise ConfigError when another batch or accumulation than the run's changes the global batch of its newest checkpoint.

    Another number of ranks alone may change it, since a requeued job may get other nodes; the training warns of that.
    """
    if not job.run.config.is_file() or not (checkpoints := job.run.checkpoints()):
        return
    train = attrgetter("train" if job.name == "train" else f"{job.name}.train")
    before, now = train(recipes.load_saved(job.run)), job.train
    if (before.batch, before.accumulate) == (now.batch, now.accumulate):
        return
    from weakclip.checkpoints import weight_files  # imports torch, and login nodes import this module

    meta = weight_files.read(checkpoints[-1]).meta
    earlier = int(meta.get("batch", int(meta["consumed"]) // int(meta["step"])))  # which earlier versions did not save
    if earlier != now.batch * now.accumulate * ranks:
        product = f"{now.batch} x {now.accumulate} x {ranks}"
        raise ConfigError(
            f"{job.batch_product} is {product} images a step, but the last steps of {job.run} took {earlier}; change them so "
            "that the product stays, or start another run with run=NEW"
        )


def _decides(key: str, sections: Sequence[str]) -> bool:
    """Return whether `key` lies in one of these sections of the recipe, and is none that may change."""
    inside = any(f"{key}.".startswith(f"{section}.") for section in sections)
    return inside and not any(f".{name}." in f".{key}." for name in MAY_CHANGE)


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted key and both values of each difference between two nested dicts."""
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield prefix + name, old, new


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def claim_data(run: RunDir, fingerprints: Sequence[str]) -> None:
    """Record the fingerprints of the run's data (Index.fingerprint, mask_folder.fingerprint), which decide the sample order.

    Raises ConfigError when the run was started with other data, even at the same path.
    """
    if run.data.is_file() and json.loads(run.data.read_text()) != list(fingerprints):
        raise ConfigError(
            f"run: the shards of data.train or data.mix are not those that {run} was started with; set run to another directory"
        )
    write_whole(run.data, json.dumps(fingerprints) + "\n")
