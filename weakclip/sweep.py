"""A sweep: one recipe and named tasks, each a few overrides with a run directory of its own. An array of jobs runs it.

    recipe: configs/voc.yaml            # found as on the command line: from the working directory
    run: runs/voc/sweeps/prompts        # the task "2" has its run in runs/voc/sweeps/prompts/2
    tasks:
      "2": [prompts.length=2]           # overrides, as on the command line
      "4": [prompts.length=4]
    repeats:                            # if each is to be done several times; in runs/voc/sweeps/prompts/2/a, .../2/b
      "a": [seed=0]
      "b": [seed=1]

Every command takes such a file for `--config`, with `--task INDEX`. `python -m weakclip.sweep FILE` lists the tasks and, where
their runs have a scores.json, its figures, which `--json OUT` keeps; `--run MODULE` runs, here, those that have none, `--jobs N`
at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from weakclip import config as configs
from weakclip.config import Config, ConfigError
from weakclip.runtime import run_dir as runs
from weakclip.runtime.atomic import write_whole
from weakclip.runtime.tables import Table


@dataclass(frozen=True)
class Task:
    name: str
    row: str
    """Its name without the repeat's."""
    run: Path
    overrides: tuple[str, ...]

    def scores(self) -> dict[str, float]:
        """What its run came to, in percent; nothing where it is not done."""
        path = self.run / runs.SCORES
        return json.loads(path.read_text()) if path.is_file() else {}


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
        if not isinstance(found, dict) or set(found) - {"repeats"} != {"recipe", "run", "tasks"}:
            keys = ", ".join(map(str, found)) if isinstance(found, dict) else "none"
            raise ConfigError(f"{path}: a sweep has the keys recipe, run and tasks, and perhaps repeats; here are {keys}")
        for key in ("recipe", "run"):
            if not isinstance(found[key], str):
                raise ConfigError(f"{path}: {key}: {found[key]!r} is no path")
        tasks = [Task(name, name, Path(found["run"], name), own) for name, own in _named(path, "tasks", found["tasks"])]
        if "repeats" in found:
            repeats = _named(path, "repeats", found["repeats"])
            tasks = [Task(f"{t.name}/{name}", t.name, t.run / name, t.overrides + own) for t in tasks for name, own in repeats]
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

    def results(self) -> Table:
        """Mean and standard deviation over a task's repeats, of every figure in their runs' scores."""
        found: dict[str, list[dict[str, float]]] = {task.row: [] for task in self.tasks}
        for task in self.tasks:
            found[task.row] += [task.scores()] if task.scores() else []
        names = list(dict.fromkeys(name for each in found.values() for scores in each for name in scores))
        rows = [(row, len(each), *(spread([s[n] for s in each if n in s]) for n in names)) for row, each in found.items()]
        return Table("mean and standard deviation", ("task", "runs", *names), rows)

    def run_all(self, module: str, jobs: int = 1) -> None:
        """Run `python -m MODULE` on each task that has no scores, `jobs` at a time. SIGTERM ends it and those that run.

        Raises ChildProcessError naming the tasks that failed, after all have had their turn.
        """
        todo = [index for index, task in enumerate(self.tasks) if not task.scores()]
        failed, start = [], time.monotonic()
        pool, running = ThreadPoolExecutor(jobs), set[subprocess.Popen[bytes]]()
        earlier = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
        try:
            ended = pool.map(partial(self._run, module, jobs, running), todo)
            for done, (index, code) in enumerate(zip(todo, ended, strict=True), 1):
                left = timedelta(seconds=round((time.monotonic() - start) / done * (len(todo) - done)))
                name, how = self.tasks[index].name, "failed" if code else "done"
                print(f"\n{name} {how}: {done} of {len(todo)}, {left} left", file=sys.stderr, flush=True)
                failed += [name] if code else []
        finally:
            signal.signal(signal.SIGTERM, earlier)
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()  # a training saves before it ends
            pool.shutdown()
        if failed:
            raise ChildProcessError(f"{self.path}: {', '.join(failed)} failed; the same command tries again what has no scores")

    def _run(self, module: str, jobs: int, running: set[subprocess.Popen[bytes]], index: int) -> int:
        """The exit status of one task, which is `running` until then. Where several run at a time they share the cores, and each
        prints into RUN.log."""
        task = self.tasks[index]
        command = [sys.executable, "-m", module, "--config", str(self.path), "--task", str(index)]
        if jobs == 1:
            return _wait_for(subprocess.Popen(command), running)
        threads, log = max(len(os.sched_getaffinity(0)) // jobs, 1), task.run.with_name(f"{task.run.name}.log")
        print(f"{task.name}: {log}", file=sys.stderr, flush=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as out:
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            return _wait_for(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment), running)


def _wait_for(process: subprocess.Popen[bytes], running: set[subprocess.Popen[bytes]]) -> int:
    """Its exit status; until then it is in `running`."""
    running.add(process)
    try:
        return process.wait()
    finally:
        running.discard(process)


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


def _named(path: str | Path, key: str, found: Any) -> list[tuple[str, tuple[str, ...]]]:
    """The names and overrides under `key`."""
    if not isinstance(found, dict) or not found:
        raise ConfigError(f'{path}: {key}: needs at least one, written "NAME": [key.sub=value]')
    for name, overrides in found.items():
        where = f"{path}: {key}.{name}"
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
            raise ConfigError(f"{where}: the name becomes a folder's; write it in quotes, of letters, digits and . _ + -")
        if not isinstance(overrides, list) or not all(isinstance(text, str) for text in overrides):
            raise ConfigError(f"{where}: {overrides!r} is no list of overrides, such as [prompts.length=2, train.batch=4]")
        if any(text.split("=")[0].strip() == "run" for text in overrides):
            raise ConfigError(f"{where}: only the sweep sets run, a folder in it for each of its tasks")
    return [(name, tuple(overrides)) for name, overrides in found.items()]


def spread(values: Sequence[float]) -> str | None:
    """Mean and standard deviation; of a single value that, of none nothing."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else None
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m weakclip.sweep", description="List the tasks and results of a sweep.")
    parser.add_argument("sweep", metavar="FILE", help="such as configs/sweeps/prompts.yaml")
    parser.add_argument("--run", metavar="MODULE", help="run what has no scores yet, here, such as weakclip.demo")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at a time (1)")
    parser.add_argument(
        "--json", type=Path, metavar="OUT", help="write the scores of all runs that have some, by the tasks' names"
    )
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error("--jobs must be 1 or more")
    sweep = Sweep.read(options.sweep)
    print(sweep.table())
    try:
        if options.run:
            sweep.run_all(options.run, options.jobs)
    finally:
        if any(task.scores() for task in sweep.tasks):
            print(f"\n{sweep.results()}")
        if options.json:
            scores = {task.name: task.scores() for task in sweep.tasks if task.scores()}
            write_whole(options.json, json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    from weakclip import cli  # not above: cli reads sweeps

    cli.run(main, sys.argv[1:])
