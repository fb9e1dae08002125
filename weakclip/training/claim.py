"""Claiming a run directory: a job starts in an empty one, or resumes a run that has the same settings and data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from weakclip import recipe as recipes
from weakclip.config import ConfigError
from weakclip.runtime.atomic import write_whole
from weakclip.runtime.run_dir import RunDir
from weakclip.training.jobs import Job


def claim(job: Job, resume: bool) -> None:
    """Create the job's run directory with the resolved recipe in it.

    Raises ConfigError when it holds files that belong to no run, a run without `resume`, or a run with other settings.
    """
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
    """Raise ConfigError when the run directory holds a run that was started with another value of a key in `job.fixed`."""
    if not job.run.config.is_file():
        return
    earlier = recipes.load_saved(job.run)
    if job.name == "classify" and earlier.data.labelled is None:  # in earlier versions the labelled set was `train`
        earlier.data.labelled = earlier.data.train
    changed = [key for key in job.fixed if attrgetter(key)(earlier) != attrgetter(key)(job.recipe)]
    if changed:
        raise ConfigError(
            f"run: {job.run} was started with another {', '.join(changed)}; "
            f"set it as in {job.run.config}, or set run to another directory"
        )


def claim_data(run: RunDir, fingerprints: Sequence[str]) -> None:
    """Record the fingerprints of the run's data (Index.fingerprint, mask_folder.fingerprint), which decide the sample order.

    Raises ConfigError when the run was started with other data, even at the same path.
    """
    if run.data.is_file() and json.loads(run.data.read_text()) != list(fingerprints):
        raise ConfigError(
            f"run: the shards of data.train or data.mix are not those that {run} was started with; set run to another directory"
        )
    write_whole(run.data, json.dumps(fingerprints) + "\n")
