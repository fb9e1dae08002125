"""The jobs submitted for a run: RUN/jobs/jobs.json, and a folder for each job with its code, config and logs.

RUN/jobs/  jobs.json  code-HASH/  1-train/  2-pseudo/  ...   (each: config.yaml, the batch script, pickles, logs)
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import weakclip
from weakclip import recipe
from weakclip.config import Config
from weakclip.runtime.atomic import write_whole
from weakclip.runtime.run_dir import RunDir

_PACKAGE = Path(str(weakclip.__file__)).parent


@dataclass(frozen=True)
class Submission:
    """One submission. tasks: number of tasks of an array, None for a single job. after: the jobs that it waits for."""

    stage: str
    job: str
    tasks: int | None
    cluster: str
    folder: str
    after: list[str]
    time: str

    @classmethod
    def of(cls, stage: str, job: str, tasks: int | None, cluster: str, folder: Path, after: list[str]) -> Submission:
        return cls(stage, job, tasks, cluster, str(folder), after, datetime.now().astimezone().isoformat(timespec="seconds"))


def read(run: RunDir) -> list[Submission]:
    """Read the submissions of a run, oldest first."""
    path = run.jobs / "jobs.json"
    return [Submission(**item) for item in json.loads(path.read_text())] if path.is_file() else []


def add(run: RunDir, entry: Submission) -> None:
    write_whole(run.jobs / "jobs.json", json.dumps([asdict(each) for each in (*read(run), entry)], indent=1) + "\n")


def next_folder(run: RunDir, stage: str, skip: int = 0) -> Path:
    """Return the folder of the next submission. skip: number of submissions planned before it.

    Folders are numbered by run, not by job, because job ids of different clusters may coincide.
    """
    numbers = [int(path.name.split("-")[0]) for path in run.jobs.glob("[0-9]*-*")]
    return run.jobs.resolve() / f"{max(numbers, default=0) + 1 + skip}-{stage}"


def write_config(config: Config, folder: Path) -> Path:
    """Write the resolved recipe and DeepSpeed's settings, so that a requeued job runs with what was submitted."""
    settings = Path(config.train.deepspeed)
    if settings.is_file():
        shutil.copy(settings, folder / "deepspeed.json")
        config = replace(config, train=replace(config.train, deepspeed=str(folder / "deepspeed.json")))
    recipe.save(config, folder / "config.yaml")
    return folder / "config.yaml"


def copy_code(run: RunDir) -> Path:
    """Copy the package into the run, unless this version is there already. The folder is named by a hash of its contents."""
    target = code_folder(run)
    if not target.is_dir():
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(_PACKAGE, partial / _PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
        partial.rename(target)
    return target


def code_folder(run: RunDir) -> Path:
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(f"{path.relative_to(_PACKAGE)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return run.jobs.resolve() / f"code-{digest.hexdigest()[:12]}"
