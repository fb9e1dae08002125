"""Submit stages of a run to Slurm, or run them on this machine without Slurm.

python launch/submit.py --stage train --config configs/voc.yaml [--nodes 2] [--gpus-per-node 8] [--dry-run] [key=value ...]
python launch/submit.py --stage all --config configs/voc.yaml --defaults configs/cluster/example.yaml
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from submitit.core.core import Job
from submitit.core.utils import FailedJobError
from submitit.local.local import LocalExecutor
from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

from weakclip import cli, labels, recipe
from weakclip.cams import make
from weakclip.config import Config, ConfigError
from weakclip.data.index import Index, open_index
from weakclip.launch import journal, logs, slurm
from weakclip.launch.job import StageJob
from weakclip.launch.journal import Submission
from weakclip.launch.resources import Resources, add_options
from weakclip.runtime import lock
from weakclip.runtime.run_dir import RunDir
from weakclip.stages import MAKERS, STAGES, Stage, chain

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """A stage to run. parts: slices of the shards for the tasks of an array, or [None] for a job of ranks."""

    stage: Stage
    resources: Resources
    parts: list[str | None]
    folder: Path
    name: str

    @property
    def tasks(self) -> int | None:
        """Number of tasks of an array; None for a single job."""
        return len(self.parts) if len(self.parts) > 1 else None

    def jobs(self, config: Config) -> list[StageJob]:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = journal.write_config(config, self.folder)
        return [StageJob(self.stage.name, path, part, self.resources.requeues) for part in self.parts]

    def script(self, code: Path) -> str:
        """Return the batch script for Slurm, without dependencies."""
        folder = self.folder.absolute()
        command = f"{self.python} -u -m submitit.core._submit {shlex.quote(str(folder))}"
        return _make_sbatch_string(command, folder, map_count=self.tasks, **self.resources.slurm(self.name, _setup(code)))

    def here(self) -> str:
        """Return how it runs on this machine. Raises ConfigError where it can't."""
        local = self.resources.local()
        ranks, gpus = local["tasks_per_node"], local["gpus_per_node"]
        what = f"tasks: {self.tasks}, {self.resources.array_parallelism} at a time" if self.tasks else f"ranks: {ranks}"
        return f"{self.stage.name}: on this machine; {what}; GPUs: {gpus}; time limit {self.resources.time}"

    @property
    def python(self) -> str:
        image = self.resources.container
        apptainer = image is not None and image.endswith(".sif")
        return f"apptainer exec --nv {shlex.quote(str(image))} python3" if apptainer else shlex.quote(sys.executable)


def make_plans(config: Config, options: argparse.Namespace) -> list[Plan]:
    """Return plans of the requested stages that are not complete. Raises ConfigError where other results are in the way."""
    asked = {name: getattr(options, name) for name in asdict(Resources()) if hasattr(options, name)}
    defaults = Resources.read(options.defaults, asked)
    stages = [STAGES[options.stage]] if options.stage != "all" else chain(config)
    if options.stage in ("classify", "cam"):
        make.open_labelled(config)  # alone, no stage before it would build the set
    made = {stage.name: stage.progress(config, None) for stage in stages if stage.name in MAKERS}
    ready = all(progress.complete for progress in made.values())
    index = _index(config) if ready and any(stage.data == "train" for stage in stages) else None

    def shards(stage: Stage) -> int:
        """Return the number of shards of a stage's set. All sets that stages write have the same number."""
        if stage.data == "val":
            return len(Index.load(str(config.data.val), config.data).shards)
        return len(index.shards) if index else next(iter(made.values())).total

    plans: list[Plan] = []
    for stage in stages:
        progress = made.get(stage.name) or stage.progress(config, index)
        if progress.complete and not plans:  # a stage after one that runs must run again
            print(f"{stage.name}: complete ({progress}), skipped")
            continue
        if progress.done and plans and not stage.overwrites:
            before = plans[-1].stage.name
            raise ConfigError(
                f"{stage.name}: {progress} of an earlier {before} exist; remove them, submit {before} alone, or change run"
            )
        resources = defaults.of(stage, asked)
        parts: list[str | None] = [None] if stage.ranks else slices(shards(stage), resources, options.array_size)
        folder = journal.next_folder(config.run_dir, stage.name, skip=len(plans))
        plans.append(Plan(stage, resources, parts, folder, f"{options.name or config.run_dir.root.name}-{stage.name}"))
    return plans


def _index(config: Config) -> Index:
    """Open data.train."""
    return open_index(config.data.train, labels.class_names(config.classes), config.data)


def slices(shards: int, resources: Resources, asked: int | None) -> list[str | None]:
    """Split the shards into `array_size` even parts, at most one per shard. Raises ConfigError where more were `asked` for."""
    if asked is not None and asked > shards:
        raise ConfigError(f"--array-size {asked}: there are only {shards} shards, and each task needs at least one")
    tasks = min(resources.array_size, shards)
    return [f"{task * shards // tasks}:{(task + 1) * shards // tasks}" for task in range(tasks)]


def check_free(run: RunDir, on_slurm: bool) -> None:
    """Raise ConfigError when a job of this run is pending or running."""
    lock.check(run)
    for entry in journal.read(run) if on_slurm else []:
        if entry.cluster == "slurm" and lock.job_lives(entry.job):
            raise ConfigError(f"run: {run} has job {entry.job} ({entry.stage}); wait, or cancel it with: scancel {entry.job}")


def to_slurm(plans: Sequence[Plan], config: Config, dependency: str | None) -> None:
    """Submit all plans, each dependent on the one before. Raises ConfigError with Slurm's message when it rejects one."""
    run = config.run_dir
    if dependency:
        slurm.check_dependency(dependency)
    for plan in plans:
        slurm.check(plan.script(journal.code_folder(run)))
    code = journal.copy_code(run)
    submitted: list[str] = []
    for plan in plans:
        # Requeues are limited by StageJob, which counts them itself.
        executor = SlurmExecutor(plan.folder, max_num_timeout=1_000_000, python=plan.python)
        executor.update_parameters(**plan.resources.slurm(plan.name, _setup(code), dependency))
        try:
            with slurm.outside_any_job():
                jobs = executor.submit_array(plan.jobs(config)) if plan.tasks else [executor.submit(*plan.jobs(config))]
        except FailedJobError as error:
            if submitted:
                subprocess.run(["scancel", *submitted], check=False)
            raise ConfigError(f"{plan.stage.name}: Slurm rejects it: {' '.join(str(error).split())}") from None
        job = jobs[0].job_id.split("_")[0]
        journal.add(run, Submission.of(plan.stage.name, job, plan.tasks, "slurm", plan.folder, submitted[-1:]))
        array = f"_[0-{plan.tasks - 1}]" if plan.tasks else ""
        print(f"{plan.stage.name:<10}job {job + array:<14}logs {plan.folder}/{job}_*_log.*")
        submitted.append(job)
        dependency = f"afterok:{job}"
    print(f"progress  weakclip status {run}\ncurves    tensorboard --logdir {run}/tensorboard")
    print(f"cancel    scancel {' '.join(submitted)}")


def to_this_machine(plans: Sequence[Plan], config: Config) -> None:
    """Run all plans here, one after the other, and show their logs. Raises ConfigError when one fails."""
    run = config.run_dir
    os.environ["PYTHONPATH"] = os.pathsep.join([str(journal.copy_code(run)), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    for plan in plans:
        print(f"{plan.stage.name}: on this machine; logs in {plan.folder}")
        executor = LocalExecutor(plan.folder, max_num_timeout=1_000_000)
        executor.update_parameters(**plan.resources.local())
        waiting = plan.jobs(config)
        while waiting:
            at_once = [waiting.pop(0) for _ in waiting[: plan.resources.array_parallelism]]
            jobs = [executor.submit(job) for job in at_once]
            name = ",".join(job.job_id for job in jobs)
            journal.add(run, Submission.of(plan.stage.name, name, plan.tasks, "local", plan.folder, []))
            _wait(jobs, plan)
    for plan in plans:
        for what, where in plan.stage.products(config).items():
            print(f"{plan.stage.name:<10}{what:<18}{where}{_miou(where) if what == 'scores' else ''}")
    print(f"{'':<10}{'curves':<18}tensorboard --logdir {run}/tensorboard")


def _miou(scores: Path) -> str:
    return f", mIoU {json.loads(scores.read_text())['miou']:.1f} %"


def _wait(jobs: Sequence[Job[None]], plan: Plan) -> None:
    """Wait for all jobs, and show the log of the first one's rank 0."""
    try:
        with jobs[0].paths.stderr.open("a+") as log:
            log.seek(0)
            while not all(job.done() for job in jobs):
                time.sleep(0.5)
                sys.stderr.write(log.read())
            sys.stderr.write(log.read())
    except KeyboardInterrupt:
        for job in jobs:
            job.cancel()
        raise
    for job in jobs:
        if job.exception() is not None:
            raise ConfigError(f"{plan.stage.name} failed: {logs.last_line(plan.folder, job.job_id).removeprefix('error: ')}")


def dry_run(plans: Sequence[Plan], config: Config, cluster: str, on_slurm: bool) -> None:
    """Print the batch scripts, or with the cluster "local" how the stages run here. -v also logs the recipe."""
    for plan in plans:
        if cluster == "local":
            print(plan.here())
        else:
            print(f"# ---- {plan.stage.name}: {f'an array of {plan.tasks} tasks' if plan.tasks else 'one job'}")
            print(plan.script(journal.code_folder(config.run_dir)))
    if cluster == "auto" and not on_slurm:
        print("# No Slurm answers here: without --dry-run these stages run on this machine, one after the other.")
    _log.debug("the recipe:\n%s", recipe.to_yaml(config))


def _setup(code: Path) -> list[str]:
    """Return shell lines that make a job import the copy of the package that was made at submission."""
    return [f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"]


def main(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> None:
    parser = cli.Parser(prog="weakclip submit", description="Submit stages to Slurm, or run them here.")
    parser.add_argument("--stage", required=True, choices=[*STAGES, "all"], help="all: the whole chain, one after the other")
    parser.add_argument("--cluster", choices=["auto", "slurm", "local"], default="auto", help="auto: Slurm if it answers")
    defaults = environment.get("WEAKCLIP_CLUSTER")
    parser.add_argument("--defaults", type=Path, metavar="FILE", default=defaults and Path(defaults), help="cluster defaults")
    parser.add_argument("--dependency", metavar="TEXT", help="dependency of the first job, such as afterok:123")
    parser.add_argument("--name", metavar="TEXT", help="prefix of the jobs' names (default: the run's)")
    parser.add_argument("--dry-run", action="store_true", help="print the batch scripts, with -v the recipe too; submit nothing")
    add_options(parser)
    config, options = cli.parse_config(parser, arguments)
    on_slurm = options.cluster == "slurm" or (options.cluster == "auto" and slurm.answers())
    plans = make_plans(config, options)
    if options.dry_run:
        dry_run(plans, config, options.cluster, on_slurm)
        return
    check_free(config.run_dir, on_slurm)
    if plans and on_slurm:
        to_slurm(plans, config, options.dependency)
    elif plans:
        to_this_machine(plans, config)


if __name__ == "__main__":
    cli.run(main)
