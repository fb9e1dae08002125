"""What was submitted for a run: RUN/jobs/jobs.json, and a folder for each job with what it runs and what it says.

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
from weakclip import config as configs
from weakclip.config import Config
from weakclip.runtime.atomic import write_whole

_PACKAGE = Path(str(weakclip.__file__)).parent


@dataclass(frozen=True)
class Entry:
    """One submission. tasks: of an array; None for a job that is none. after: the jobs that it waits for."""

    stage: str
    job: str
    tasks: int | None
    cluster: str
    folder: str
    after: list[str]
    time: str

    @classmethod
    def of(cls, stage: str, job: str, tasks: int | None, cluster: str, folder: Path, after: list[str]) -> Entry:
        return cls(stage, job, tasks, cluster, str(folder), after, datetime.now().astimezone().isoformat(timespec="seconds"))


def read(run: Path) -> list[Entry]:
    """Oldest first."""
    path = run / "jobs" / "jobs.json"
    return [Entry(**item) for item in json.loads(path.read_text())] if path.is_file() else []


def add(run: Path, entry: Entry) -> None:
    write_whole(run / "jobs" / "jobs.json", json.dumps([asdict(each) for each in (*read(run), entry)], indent=1) + "\n")


def next_folder(run: Path, stage: str, skip: int = 0) -> Path:
    """Where the next submission's files go: never where another's were, since a new cluster counts its jobs from 1 again."""
    numbers = [int(path.name.split("-")[0]) for path in (run / "jobs").glob("[0-9]*-*")]
    return run.resolve() / "jobs" / f"{max(numbers, default=0) + 1 + skip}-{stage}"


def write_config(config: Config, folder: Path) -> Path:
    """The resolved recipe, with DeepSpeed's settings beside it: what begins anew must be what was submitted."""
    settings = Path(config.train.deepspeed)
    if settings.is_file():
        shutil.copy(settings, folder / "deepspeed.json")
        config = replace(config, train=replace(config.train, deepspeed=str(folder / "deepspeed.json")))
    configs.save(config, folder / "config.yaml")
    return folder / "config.yaml"


def copy_code(run: Path) -> Path:
    """A copy of the program, named by its contents, so that the next submission of the same program finds it there."""
    target = code_folder(run)
    if not target.is_dir():
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(_PACKAGE, partial / _PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
        partial.rename(target)
    return target


def code_folder(run: Path) -> Path:
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(f"{path.relative_to(_PACKAGE)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return run.resolve() / "jobs" / f"code-{digest.hexdigest()[:12]}"
