"""A sweep: one recipe and named tasks, each a few overrides with a run directory of its own. An array of jobs runs it.

    recipe: configs/voc.yaml            # found as on the command line: from the working directory
    run: runs/voc/sweeps/prompts        # the task "2" has its run in runs/voc/sweeps/prompts/2
    tasks:
      "2": [prompts.length=2]           # overrides, as on the command line
      "4": [prompts.length=4]

Every command takes such a file for `--config`, with `--task INDEX`. `python -m weakclip.sweep FILE` lists the tasks.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from weakclip import config as configs
from weakclip.config import Config, ConfigError
from weakclip.tables import Table


@dataclass(frozen=True)
class Task:
    name: str
    run: Path
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    path: Path
    recipe: Path
    tasks: tuple[Task, ...]

    @classmethod
    def read(cls, path: str | Path) -> Sweep:
        """The sweep in the YAML file `path`; all of its tasks are checked against the recipe.

        Raises ConfigError naming the file and the key.
        """
        found = _load(path)
        if not isinstance(found, dict) or set(found) != {"recipe", "run", "tasks"}:
            keys = ", ".join(map(str, found)) if isinstance(found, dict) else "none"
            raise ConfigError(f"{path}: a sweep has the keys recipe, run and tasks; here are {keys}")
        for key in ("recipe", "run"):
            if not isinstance(found[key], str):
                raise ConfigError(f"{path}: {key}: {found[key]!r} is no path")
        if not isinstance(found["tasks"], dict) or not found["tasks"]:
            raise ConfigError(f'{path}: tasks: needs at least one, written "NAME": [key.sub=value]')
        tasks = [_task(path, name, Path(found["run"]), overrides) for name, overrides in found["tasks"].items()]
        sweep = cls(Path(path), Path(found["recipe"]), tuple(tasks))
        sweep._check()
        return sweep

    def _check(self) -> None:
        """A mistake in any task shows in every job of the array, before the first has trained for a day."""
        tried = {"recipe": (), **{f"tasks.{task.name}": task.overrides for task in self.tasks}}
        for where, overrides in tried.items():
            try:
                configs.load(self.recipe, overrides)
            except ConfigError as error:
                raise ConfigError(f"{self.path}: {where}: {error}") from error

    def config(self, index: int | None, overrides: Sequence[str] = ()) -> Config:
        """The config of task `index` (None: of the job in an array), with `overrides` after the task's own.

        Raises ConfigError when there is no such task, or no index at all.
        """
        task = self._choose(index)
        return configs.load(self.recipe, [f"run={task.run}", *task.overrides, *overrides])

    def _choose(self, index: int | None) -> Task:
        chosen = os.environ.get("SLURM_ARRAY_TASK_ID") if index is None else str(index)
        if chosen is None:
            listed = ", ".join(f"{number} ({task.name})" for number, task in enumerate(self.tasks))
            raise ConfigError(f"{self.path} is a sweep of {listed}; choose by --task, or run it as sbatch {self.array}")
        if not chosen.isdecimal() or int(chosen) >= len(self.tasks):
            source = "SLURM_ARRAY_TASK_ID" if index is None else "--task"
            raise ConfigError(f"{source}: {self.path} has no task {chosen}; as an array it is {self.array}")
        return self.tasks[int(chosen)]

    @property
    def array(self) -> str:
        """sbatch's option that runs every task."""
        return f"--array=0-{len(self.tasks) - 1}"

    def table(self) -> Table:
        rows = [(number, task.name, str(task.run), " ".join(task.overrides)) for number, task in enumerate(self.tasks)]
        return Table(f"{self.path}: {self.recipe} as sbatch {self.array}", ("task", "name", "run", "overrides"), rows)


def is_sweep(path: str | Path) -> bool:
    """Whether a file is a sweep rather than a recipe; what is no YAML counts as a recipe, whose reader says what is wrong."""
    try:
        found = _load(path)
    except ConfigError:
        return False
    return isinstance(found, dict) and ("tasks" in found or "recipe" in found)


def _load(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such sweep file")
    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # PyYAML's errors share no base with OmegaConf's
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error


def _task(path: str | Path, name: Any, run: Path, overrides: Any) -> Task:
    where = f"{path}: tasks.{name}"
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
        raise ConfigError(f"{where}: the name becomes a folder's; write it in quotes, of letters, digits and . _ + -")
    if not isinstance(overrides, list) or not all(isinstance(text, str) for text in overrides):
        raise ConfigError(f"{where}: {overrides!r} is no list of overrides, such as [prompts.length=2, train.batch=4]")
    if any(text.split("=")[0].strip() == "run" for text in overrides):
        raise ConfigError(f"{where}: a task cannot set run; it is {run / name}")
    return Task(name, run / name, tuple(overrides))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m weakclip.sweep", description="List the tasks of a sweep.")
    parser.add_argument("sweep", metavar="FILE", help="such as configs/sweeps/prompts.yaml")
    print(Sweep.read(parser.parse_args(arguments).sweep).table())


if __name__ == "__main__":
    from weakclip import cli  # not above: cli reads sweeps

    cli.run(main, sys.argv[1:])
