"""Show the stages of a run: job, state, progress, time left, and last log line.

python launch/status.py runs/voc
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path

from weakclip import cli, recipe
from weakclip.config import Config, ConfigError
from weakclip.data.index import Index
from weakclip.datasets import writing
from weakclip.launch import journal, logs, slurm
from weakclip.launch.journal import Submission
from weakclip.runtime import lock
from weakclip.runtime.errors import UserError
from weakclip.runtime.run_dir import RunDir
from weakclip.runtime.tables import Table
from weakclip.stages import STAGES, Progress, is_made
from weakclip.training.jobs import JOBS

FAILED = {"FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED"}


def table(run: Path) -> Table:
    """Return a table with a row for the newest job of each stage, and for each training that was started without a job.

    Raises ConfigError when `run` holds neither.
    """
    newest = {entry.stage: entry for entry in journal.read(RunDir(run))}
    tasks = slurm.tasks(entry.job for entry in newest.values() if entry.cluster == "slurm")
    states = {entry.job: _states(entry, tasks) for entry in newest.values()}
    rows = {
        stage: (
            entry.job,
            _in_words(entry, states, [*newest.values()]),
            *_progress(stage, recipe.load_saved(RunDir(Path(entry.folder)))),
            _last(entry),
        )
        for stage, entry in newest.items()
    }
    rows |= {stage: _direct(stage, own) for stage, own in _trainings(RunDir(run)).items() if stage not in newest}
    if not rows:
        raise ConfigError(
            f"{run}: holds no training, and no job was submitted for it; pass the value of `run`, or start it: weakclip submit"
        )
    listed = [(stage, *rows[stage]) for stage in STAGES if stage in rows]
    return Table(str(run), ("stage", "job", "state", "progress", "left", "last line"), listed)


# ------------------------------------------------------------------------------------------------------ without a job


def _trainings(run: RunDir) -> dict[str, RunDir]:
    """Return the run directories of the trainings in a run, by stage; of several retrained networks the newest."""
    networks = sorted(run.root.glob("retrain/*/config.yaml"), key=lambda path: path.stat().st_mtime)
    found = [("classify", run.classifier), ("train", run), *(("retrain", RunDir(path.parent)) for path in networks[-1:])]
    return {stage: own for stage, own in found if own.config.is_file()}


def _direct(stage: str, run: RunDir) -> tuple[str, str, str, str, str]:
    """Return the row of a training that no job runs: the process, its state, progress, time left, and its newest metrics."""
    saved = recipe.load_saved(run)
    steps = (getattr(saved, stage) if stage in ("classify", "retrain") else saved).train.steps
    lines, process = _newest_lines(run), lock.holder(run)
    progress = Progress(int(lines[-1]["step"]) if lines else 0, steps, "steps")
    state = "RUNNING" if process else "COMPLETED" if progress.complete else "STOPPED"
    left = "" if progress.complete else _left([(line["time"], line["step"]) for line in lines], progress)
    return str(process or "-"), state, str(progress), left, _summary(lines[-1]) if lines else ""


def _newest_lines(run: RunDir) -> list[dict[str, float]]:
    """Return the last lines of a training's metrics.jsonl that are about steps."""
    if not run.metrics.is_file():
        return []
    lines = [line for line in run.metrics.read_text().splitlines()[-20:] if line.endswith("}")]
    return [found for found in map(json.loads, lines) if "lr" in found]


def _summary(line: dict[str, float]) -> str:
    losses = " ".join(f"{name.removeprefix('loss/')} {value:.3f}" for name, value in line.items() if "loss/" in name)
    return f"{losses}  lr {line['lr']:.1e}  {line['images_per_second']:.1f} images/s"


# --------------------------------------------------------------------------------------------------------------- jobs


def _states(entry: Submission, tasks: Sequence[slurm.SlurmTask]) -> Counter[str]:
    """Count the tasks of a job in each state."""
    if entry.cluster == "slurm":
        return Counter(task.state for task in tasks if task.job == entry.job) or Counter(["UNKNOWN"])
    return Counter("RUNNING" if Path(f"/proc/{pid}").exists() else "ENDED" for pid in entry.job.split(","))


def _in_words(entry: Submission, states: dict[str, Counter[str]], entries: Sequence[Submission]) -> str:
    counts = states[entry.job]
    words = ", ".join(f"{number} {state}" for state, number in counts.items()) if entry.tasks else next(iter(counts))
    failed = _failed_before(entry, states, entries)
    return f"{words}: {failed} failed" if failed and "CANCELLED" in counts else words


def _failed_before(entry: Submission, states: dict[str, Counter[str]], entries: Sequence[Submission]) -> str | None:
    """Return the failed stage that this one waited for, directly or indirectly, if there is one."""
    for other in entries:
        if other.job in entry.after:
            return other.stage if states[other.job].keys() & FAILED else _failed_before(other, states, entries)
    return None


def _progress(stage: str, config: Config) -> tuple[str, str]:
    """Return the progress of a stage, and the time left at the rate so far."""
    try:
        index = Index.load(config.data.train, config.data) if STAGES[stage].data == "train" and is_made(config) else None
        progress = STAGES[stage].progress(config, index)
    except UserError as error:
        return f"? ({error})", ""
    times = _TIMES[stage](config) if stage in _TIMES else []
    if stage in JOBS and times:
        progress = Progress(int(times[-1][1]), progress.total, progress.unit)
    return str(progress), "" if progress.complete else _left(times, progress)


def _newest_steps(name: str, config: Config) -> list[tuple[float, float]]:
    """Return (time, step) of the last lines of a training's metrics.jsonl."""
    return [(line["time"], line["step"]) for line in _newest_lines(JOBS[name](config).run)]


def _times_of_files(files: Iterable[Path]) -> list[tuple[float, float]]:
    """Return (time, number) of each file, in the order in which they were written."""
    return [*zip(sorted(path.stat().st_mtime for path in files), count(1), strict=False)]


_TIMES: dict[str, Callable[[Config], list[tuple[float, float]]]] = {
    "shards": lambda config: _times_of_files(writing.partial_folder(Path(config.data.built)).glob("shard-*.json")),
    "cam": lambda config: _times_of_files(writing.partial_folder(Path(config.data.train)).glob("shard-*.json")),
    **{name: partial(_newest_steps, name) for name in JOBS},
    "pseudo": lambda config: _times_of_files(config.run_dir.pseudo.rglob("*.png")),
}
"""Functions that return (time, amount done) of a stage, oldest first."""


def _left(times: Sequence[tuple[float, float]], progress: Progress) -> str:
    if len(times) < 2 or times[-1][1] <= times[0][1]:
        return ""
    seconds_each = (times[-1][0] - times[0][0]) / (times[-1][1] - times[0][1])
    return str(timedelta(seconds=round(seconds_each * (progress.total - progress.done))))


def _last(entry: Submission) -> str:
    lines = [logs.last_line(Path(entry.folder), job) for job in entry.job.split(",")]
    return next((line for line in lines if line.startswith("error: ")), lines[-1])[:120]


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(prog="weakclip status", description="Show the state of a run's stages.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, such as runs/voc")
    print(table(parser.parse_args(arguments).run))


if __name__ == "__main__":
    cli.run(main)
