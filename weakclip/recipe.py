"""Reading recipes: YAML files, `key.sub=value` overrides and tasks of a sweep -> a Config.

A sweep is one recipe and named tasks, each with a few overrides and its own run directory. A job array runs it.

    recipe: configs/voc.yaml            # relative to the working directory, as on the command line
    run: runs/voc/sweeps/prompts        # the run directory of the task "2" is runs/voc/sweeps/prompts/2
    tasks:
      "2": [prompts.length=2]           # overrides, as on the command line
      "4": [prompts.length=4]
    repeats:                            # optional: repeats of each task, in runs/voc/sweeps/prompts/2/a and .../2/b
      "a": [seed=0]
      "b": [seed=1]
"""

from __future__ import annotations

import copy
import difflib
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from weakclip.config import Config, ConfigError
from weakclip.runtime.atomic import write_whole
from weakclip.runtime.run_dir import RunDir

RENAMED = {
    "cam.data": "data.labelled",
    "loss.boundary": "loss.weights.boundary",
    "loss.auxiliary": "loss.weights.auxiliary",
    "loss.ratio_clamp": "boundary.ratio_clamp",
    "loss.truncate_image": "boundary.truncate_image",
}
"""Keys of earlier versions -> their current names."""


def load(path: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Return the config of one or several YAML files and of `overrides` ("seed=1"). Later files change earlier ones.

    Raises ConfigError for a missing file, an unknown key (naming the nearest), a wrong type or a value out of range.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(each) for each in path]
    for text in overrides:
        if "=" not in text or text.startswith("-"):
            raise ConfigError(f"{text!r}: an override is written key.sub=value")
    merged = _defaults()
    for each in paths:
        _merge(merged, _read_yaml(each, "config"), str(each))
    for text in overrides:
        _merge(merged, _parse(lambda text=text: OmegaConf.from_dotlist([text]), text), text)  # type: ignore[misc]
    return _to_config(merged, ", ".join(map(str, paths or overrides)))


def load_saved(run: RunDir) -> Config:
    """Return the config that a run was started with, also by an earlier version with other key names. Raises as `load`."""
    found = _read_yaml(run.config, "config")
    for old, new in RENAMED.items():
        group, _, name = old.partition(".")
        if isinstance(section := found.get(group), DictConfig) and name in section:
            value = section.pop(name)
            OmegaConf.update(found, new, float(value) if new.startswith("loss.weights.") else value, force_add=True)
    if isinstance(OmegaConf.to_container(found).get("data", {}).get("build"), list):  # type: ignore[union-attr]
        found.data.pop("build")  # an earlier version's command line; it does not decide what is trained
    merged = _defaults()
    _merge(merged, found, str(run.config))
    return _to_config(merged, str(run.config))


def save(config: Config, path: Path) -> None:
    """Write the resolved config as YAML."""
    write_whole(path, to_yaml(config))


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


# ------------------------------------------------------------------------------------------------------------- sweeps


@dataclass(frozen=True)
class SweepTask:
    """One task of a sweep."""

    name: str
    """TASK, or TASK/REPEAT where the sweep has repeats."""
    row: str
    """TASK: the task's row in the table of results, which all its repeats share."""
    run: RunDir
    overrides: tuple[str, ...]
    """The task's overrides, then the repeat's."""


@dataclass(frozen=True)
class Sweep:
    """One recipe and the tasks that vary it."""

    path: Path
    recipe: Path
    tasks: tuple[SweepTask, ...]

    @classmethod
    def read(cls, path: str | Path) -> Sweep:
        """Read the sweep in the YAML file `path` and check all of its tasks against the recipe.

        Raises ConfigError naming the file and the key.
        """
        found = OmegaConf.to_container(_read_yaml(Path(path), "sweep"))
        if not isinstance(found, dict) or set(found) - {"repeats"} != {"recipe", "run", "tasks"}:
            keys = ", ".join(map(str, found)) if isinstance(found, dict) else "none"
            raise ConfigError(f"{path}: a sweep has the keys recipe, run, tasks and optionally repeats; this file has {keys}")
        for key in ("recipe", "run"):
            if not isinstance(found[key], str):
                raise ConfigError(f"{path}: {key}: {found[key]!r} is not a path")
        folder = Path(found["run"])
        tasks = [SweepTask(name, name, RunDir(folder / name), own) for name, own in _named(path, "tasks", found["tasks"])]
        if "repeats" in found:
            repeats = _named(path, "repeats", found["repeats"])
            tasks = [
                SweepTask(f"{task.name}/{name}", task.name, RunDir(task.run.root / name), task.overrides + own)
                for task in tasks
                for name, own in repeats
            ]
        sweep = cls(Path(path), Path(found["recipe"]), tuple(tasks))
        sweep._check()
        return sweep

    def _check(self) -> None:
        """Load the config of every task, so that a mistake in one stops each job of the array before it has trained for a day."""
        tried = {"recipe": (), **{f"tasks.{task.name}": task.overrides for task in self.tasks}}
        for where, overrides in tried.items():
            try:
                load(self.recipe, overrides)
            except ConfigError as error:
                raise ConfigError(f"{self.path}: {where}: {error}") from error

    def config(self, index: int | None, overrides: Sequence[str] = ()) -> Config:
        """Return the config of task `index` (None: SLURM_ARRAY_TASK_ID), with `overrides` applied after the task's own.

        Raises ConfigError when there is no such task, or when neither gives an index.
        """
        task = self._choose(index)
        return load(self.recipe, [f"run={task.run}", *task.overrides, *overrides])

    def _choose(self, index: int | None) -> SweepTask:
        chosen = os.environ.get("SLURM_ARRAY_TASK_ID") if index is None else str(index)
        if chosen is None:
            listed = ", ".join(f"{number} ({task.name})" for number, task in enumerate(self.tasks))
            raise ConfigError(f"{self.path} is a sweep of {listed}; choose one by --task, or run all by sbatch {self.array}")
        if not chosen.isdecimal() or int(chosen) >= len(self.tasks):
            source = "SLURM_ARRAY_TASK_ID" if index is None else "--task"
            raise ConfigError(f"{source}: {self.path} has no task {chosen}; the whole sweep is {self.array}")
        return self.tasks[int(chosen)]

    @property
    def array(self) -> str:
        """The option of sbatch that runs every task."""
        return f"--array=0-{len(self.tasks) - 1}"


def is_sweep(path: str | Path) -> bool:
    """Return whether a file is a sweep rather than a recipe. Invalid YAML counts as a recipe, whose reader names the mistake."""
    try:
        found = OmegaConf.to_container(_read_yaml(Path(path), "sweep"))
    except ConfigError:
        return False
    return isinstance(found, dict) and ("tasks" in found or "recipe" in found)


def _named(path: str | Path, key: str, found: Any) -> list[tuple[str, tuple[str, ...]]]:
    """Return the names and overrides under `key`. Raises ConfigError naming the file and the key."""
    if not isinstance(found, dict) or not found:
        raise ConfigError(f'{path}: {key}: needs at least one entry, written "NAME": [key.sub=value]')
    for name, overrides in found.items():
        where = f"{path}: {key}.{name}"
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
            raise ConfigError(f"{where}: the name becomes a directory; write it in quotes, with letters, digits and . _ + - only")
        if not isinstance(overrides, list) or not all(isinstance(text, str) for text in overrides):
            raise ConfigError(f"{where}: {overrides!r} is not a list of overrides, such as [prompts.length=2, train.batch=4]")
        if any(text.split("=")[0].strip() == "run" for text in overrides):
            raise ConfigError(f"{where}: remove run; the sweep gives each task its own run directory")
    return [(name, tuple(overrides)) for name, overrides in found.items()]


# ------------------------------------------------------------------------------------------------------------ reading


def _read_yaml(path: Path, what: str) -> Any:
    if not path.is_file():
        raise ConfigError(f"{path}: no such {what} file")
    return _parse(lambda: OmegaConf.load(path), str(path))


def _parse(read: Callable[[], Any], source: str) -> Any:
    try:
        return read()
    except Exception as error:  # PyYAML's errors share no base with OmegaConf's
        raise ConfigError(f"{source}: {' '.join(str(error).split())}") from error


def _defaults() -> Any:
    """Return a new OmegaConf tree with the default of every key, and its type."""
    return copy.deepcopy(_schema())  # a tenth of the time that making one takes


@functools.cache
def _schema() -> Any:
    return OmegaConf.structured(Config)


def _merge(base: Any, changes: Any, source: str) -> None:
    """Change `base` in place. Raises ConfigError naming `source` and the key."""
    _refuse_old_keys(changes, source)
    try:
        base.merge_with(changes)
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        nearest = difflib.get_close_matches(key, list(_keys(Config)), n=1, cutoff=0.0)[0]
        raise ConfigError(f"{source}: unknown key {key!r}; the nearest is {nearest!r}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {error.full_key or ''}: {str(error).splitlines()[0]}") from error
    except TypeError as error:  # a list where the recipe is a mapping; OmegaConf has no error of its own for it
        raise ConfigError(f"{source}: {' '.join(str(error).split())}") from error


def _refuse_old_keys(changes: Any, source: str) -> None:
    if not isinstance(changes, DictConfig):
        return
    plain = OmegaConf.to_container(changes)
    assert isinstance(plain, dict)
    for old, new in RENAMED.items():
        group, _, name = old.partition(".")
        if isinstance(plain.get(group), dict) and name in plain[group]:
            raise ConfigError(f"{source}: {old} was renamed; use {new}")
    if isinstance(plain.get("data"), dict) and isinstance(plain["data"].get("build"), list):
        raise ConfigError(f"{source}: data.build is now a mapping, such as {{source: voc, devkit: DIR, split: trainaug}}")


def _to_config(merged: Any, source: str) -> Config:
    try:
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except (OmegaConfBaseException, ConfigError) as error:
        raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from error


def _keys(cls: type, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(cls)
    for item in fields(cls):  # type: ignore[arg-type]
        yield prefix + item.name
        for candidate in (hints[item.name], *getattr(hints[item.name], "__args__", ())):
            if isinstance(candidate, type) and is_dataclass(candidate):
                yield from _keys(candidate, f"{prefix}{item.name}.")
