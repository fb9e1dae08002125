"""List the tasks of a sweep and the results of their runs; run tasks that have no scores.

weakclip sweep FILE                                      list tasks and results
weakclip sweep FILE --run weakclip.demo --jobs 2         run `python -m weakclip.demo` here on each task without scores
weakclip sweep FILE --json OUT                           write the scores to OUT

weakclip.recipe documents the format of a sweep. Every command takes one for `--config`, with `--task INDEX`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

from weakclip import cli
from weakclip.recipe import Sweep, SweepTask
from weakclip.runtime.atomic import write_whole
from weakclip.runtime.command_line import output_file
from weakclip.runtime.errors import UserError
from weakclip.runtime.tables import Table, spread
from weakclip.runtime.workers import cores

_log = logging.getLogger(__name__)


def scores_of(task: SweepTask) -> dict[str, float]:
    """Return the final scores of a task's run, in percent; empty while it is not done."""
    path = task.run.final_scores
    return json.loads(path.read_text()) if path.is_file() else {}


def table(sweep: Sweep) -> Table:
    """Return the table of tasks."""
    rows = [(number, task.name, str(task.run), " ".join(task.overrides)) for number, task in enumerate(sweep.tasks)]
    return Table(f"{sweep.path}: {sweep.recipe} as sbatch {sweep.array}", ("task", "name", "run", "overrides"), rows)


def results(sweep: Sweep) -> Table:
    """Return mean and std of every score over the repeats of each task."""
    found: dict[str, list[dict[str, float]]] = {task.row: [] for task in sweep.tasks}
    for task in sweep.tasks:
        found[task.row] += [scores_of(task)] if scores_of(task) else []
    names = list(dict.fromkeys(name for each in found.values() for scores in each for name in scores))
    rows = [(row, len(each), *(spread([s[n] for s in each if n in s]) for n in names)) for row, each in found.items()]
    return Table("mean and std", ("task", "runs", *names), rows)


def run_all(sweep: Sweep, module: str, jobs: int = 1) -> None:
    """Run `python -m MODULE` on each task that has no scores, `jobs` at a time. SIGTERM also ends the running tasks.

    Raises UserError naming the tasks that failed, after all tasks have run.
    """
    todo = [index for index, task in enumerate(sweep.tasks) if not scores_of(task)]
    failed, start = [], time.monotonic()
    pool, running = ThreadPoolExecutor(jobs), set[subprocess.Popen[bytes]]()
    earlier = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        ended = pool.map(partial(_run, sweep, module, jobs, running), todo)
        for done, (index, code) in enumerate(zip(todo, ended, strict=True), 1):
            left = timedelta(seconds=round((time.monotonic() - start) / done * (len(todo) - done)))
            name, how = sweep.tasks[index].name, "failed" if code else "done"
            _log.info("%s %s: %d of %d, %s left", name, how, done, len(todo), left)
            failed += [name] if code else []
    finally:
        signal.signal(signal.SIGTERM, earlier)
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()  # a training saves before it ends
        pool.shutdown()
    if failed:
        raise UserError(f"{sweep.path}: {', '.join(failed)} failed; run the same command again to retry tasks without scores")


def _run(sweep: Sweep, module: str, jobs: int, running: set[subprocess.Popen[bytes]], index: int) -> int:
    """Run one task and return its exit status. Tasks that run at the same time share the cores, and each writes to RUN.log."""
    task = sweep.tasks[index]
    command = [sys.executable, "-m", module, "--config", str(sweep.path), "--task", str(index)]
    if jobs == 1:
        return _wait_for(subprocess.Popen(command), running)
    threads, log = max(cores() // jobs, 1), task.run.root.with_name(f"{task.run.root.name}.log")
    _log.info("%s: log in %s", task.name, log)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as out:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        return _wait_for(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment), running)


def _wait_for(process: subprocess.Popen[bytes], running: set[subprocess.Popen[bytes]]) -> int:
    """Wait for a process and return its exit status; until then it is in `running`."""
    running.add(process)
    try:
        return process.wait()
    finally:
        running.discard(process)


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(prog="weakclip sweep", description="List the tasks and results of a sweep.")
    parser.add_argument("sweep", metavar="FILE", help="such as configs/sweeps/prompts.yaml")
    parser.add_argument("--run", metavar="MODULE", help="run tasks without scores here, by this module, such as weakclip.demo")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="tasks that run at the same time (default: 1)")
    parser.add_argument("--json", type=output_file, metavar="OUT", help="write the scores of the runs that have some, by task")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error("--jobs must be 1 or more")
    sweep = Sweep.read(options.sweep)
    print(table(sweep))
    try:
        if options.run:
            run_all(sweep, options.run, options.jobs)
    finally:
        if any(scores_of(task) for task in sweep.tasks):
            print(f"\n{results(sweep)}")
        if options.json:
            scores = {task.name: scores_of(task) for task in sweep.tasks if scores_of(task)}
            options.json.parent.mkdir(parents=True, exist_ok=True)
            write_whole(options.json, json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
