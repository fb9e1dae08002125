"""How a run's stages are: job, state, progress, time left, and what they said last.

python launch/status.py runs/voc
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path

from weakclip import cli
from weakclip import config as configs
from weakclip.config import Config, ConfigError
from weakclip.data.index import Index
from weakclip.datasets import writing
from weakclip.launch import journal, logs, slurm
from weakclip.launch.journal import Entry
from weakclip.runtime.tables import Table
from weakclip.stages import STAGES, Progress, is_made
from weakclip.training.jobs import TASKS, Task

FAILED = {"FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED"}


def table(run: Path) -> Table:
    """A row for the newest job of each stage. Raises ConfigError when nothing was submitted for the run."""
    newest = {entry.stage: entry for entry in journal.read(run)}
    if not newest:
        raise ConfigError(f"{run}: no job was submitted for it; python launch/submit.py does that")
    tasks = slurm.tasks(entry.job for entry in newest.values() if entry.cluster == "slurm")
    states = {entry.job: _states(entry, tasks) for entry in newest.values()}
    rows = [
        (
            stage,
            newest[stage].job,
            _in_words(newest[stage], states, [*newest.values()]),
            *_progress(stage, newest[stage]),
            _last(newest[stage]),
        )
        for stage in STAGES
        if stage in newest
    ]
    return Table(str(run), ("stage", "job", "state", "progress", "left", "last line"), rows)


def _states(entry: Entry, tasks: Sequence[slurm.Task]) -> Counter[str]:
    """How many tasks of a job are in each state."""
    if entry.cluster == "slurm":
        return Counter(task.state for task in tasks if task.job == entry.job) or Counter(["UNKNOWN"])
    return Counter("RUNNING" if Path(f"/proc/{pid}").exists() else "ENDED" for pid in entry.job.split(","))


def _in_words(entry: Entry, states: dict[str, Counter[str]], entries: Sequence[Entry]) -> str:
    counts = states[entry.job]
    words = ", ".join(f"{number} {state}" for state, number in counts.items()) if entry.tasks else next(iter(counts))
    failed = _failed_before(entry, states, entries)
    return f"{words}: {failed} failed" if failed and "CANCELLED" in counts else words


def _failed_before(entry: Entry, states: dict[str, Counter[str]], entries: Sequence[Entry]) -> str | None:
    """The stage that failed, if one did that this one waited for, be it through others."""
    for other in entries:
        if other.job in entry.after:
            return other.stage if states[other.job].keys() & FAILED else _failed_before(other, states, entries)
    return None


def _progress(stage: str, entry: Entry) -> tuple[str, str]:
    """How much of the stage is done, and the time left at the rate so far."""
    config = configs.load(Path(entry.folder) / "config.yaml")
    try:
        index = Index.load(config.data.train, config.data) if STAGES[stage].data == "train" and is_made(config) else None
        progress = STAGES[stage].progress(config, index)
    except ValueError as error:
        return f"? ({error})", ""
    times = _TIMES[stage](config) if stage in _TIMES else []
    if stage in TASKS and times:
        progress = Progress(int(times[-1][1]), progress.total, progress.unit)
    return str(progress), "" if progress.complete else _left(times, progress)


def _newest_steps(task: type[Task], config: Config) -> list[tuple[float, float]]:
    """(time, step) of the last lines of a training's metrics.jsonl."""
    path = task(config).run / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = [line for line in path.read_text().splitlines()[-20:] if line.endswith("}")]
    return [(found["time"], found["step"]) for found in map(json.loads, lines) if "lr" in found]


def _times_of_files(files: Iterable[Path]) -> list[tuple[float, float]]:
    """(time, number) of each, in the order in which they were written."""
    return [*zip(sorted(path.stat().st_mtime for path in files), count(1), strict=False)]


_TIMES: dict[str, Callable[[Config], list[tuple[float, float]]]] = {
    "shards": lambda config: _times_of_files(writing.partial_folder(Path(config.labelled)).glob("shard-*.json")),
    "cam": lambda config: _times_of_files(writing.partial_folder(Path(config.data.train)).glob("shard-*.json")),
    **{name: partial(_newest_steps, task) for name, task in TASKS.items()},
    "pseudo": lambda config: _times_of_files((Path(config.run) / "pseudo").glob("*.png")),
}
"""When how much of a stage was done."""


def _left(times: Sequence[tuple[float, float]], progress: Progress) -> str:
    if len(times) < 2 or times[-1][1] <= times[0][1]:
        return ""
    seconds_each = (times[-1][0] - times[0][0]) / (times[-1][1] - times[0][1])
    return str(timedelta(seconds=round(seconds_each * (progress.total - progress.done))))


def _last(entry: Entry) -> str:
    lines = [logs.last_line(Path(entry.folder), job) for job in entry.job.split(",")]
    return next((line for line in lines if line.startswith("error: ")), lines[-1])[:120]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python launch/status.py", description="How a run's stages are.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/voc")
    print(table(parser.parse_args(arguments).run))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
