"""The training loop of WeakCLIP, the classifier before it and the network after it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import islice
from typing import TypeVar, cast

import torch

from weakclip.data.index import Index
from weakclip.data.stream import StreamSettings, training_batches
from weakclip.models.interface import Trained
from weakclip.runtime import lock, log
from weakclip.runtime.errors import is_user_error
from weakclip.runtime.signals import Interrupted
from weakclip.training.claim import claim, claim_data, require_same_batch
from weakclip.training.data import TrainingData
from weakclip.training.deepspeed_settings import deepspeed_settings
from weakclip.training.doubts import doubts
from weakclip.training.engine import Engine
from weakclip.training.feeding import on_device
from weakclip.training.interruption import Interruption
from weakclip.training.jobs import Job
from weakclip.training.monitor import Monitor
from weakclip.training.tasks import Task, task_of
from weakclip.training.validation import validate
from weakclip.training.world import World

_log = logging.getLogger(__name__)

T = TypeVar("T")


def train(job: Job, data: TrainingData, world: World, resume: bool = False) -> None:
    """Run a training job on all ranks. data: its shard sets. resume: start from the newest checkpoint, if there is one.

    Raises UserError for mistakes of the user, Interrupted when a signal stops the training.
    """
    try:
        _train(task_of(job), data, world, resume)
    finally:
        if world.rank == 0:
            lock.release(job.run)


def _train(task: Task, data: TrainingData, world: World, resume: bool) -> None:
    job = task.job
    stream = StreamSettings(job.data, job.augment, job.recipe.seed, job.train.batch)
    torch.manual_seed(job.recipe.seed)
    # All that may be wrong with the settings is found before the run directory holds them.
    _agreed(world, lambda: _check(job, stream))
    model = _agreed(world, lambda: task.build(pretrained=True))
    _agreed(world, lambda: _claim(task, world, resume, data.sets))
    with log.to_file(job.run.log(world.rank), world.rank):
        _run(task, model, data, stream, world, resume)


def _run(task: Task, model: Trained, data: TrainingData, settings: StreamSettings, world: World, resume: bool) -> None:
    job, (index, *mixed) = task.job, data.sets
    newest = job.run.checkpoints()[-1:] if resume else []
    engine = Engine(model, job, world, *newest)
    if world.rank == 0:
        _announce(job, engine, sum(len(each.entries) for each in data.sets), data.validation)
    interruption = Interruption()
    stream = training_batches(index, settings, task.target, engine.consumed, world.rank, world.ranks, mixed)
    batches = on_device(stream, world.device)
    # Closing ends the loader's processes at once, not at garbage collection, and writes the last points of the curves.
    with closing(Monitor(job, engine)) as monitor, closing(stream):
        while engine.step < job.train.steps:
            with monitor.waiting():
                micro_batches = list(islice(batches, job.train.accumulate))
            monitor.step(micro_batches, engine.train_step(micro_batches))
            last = engine.step == job.train.steps
            with monitor.pausing():
                if last or engine.step % job.train.validate_every == 0:
                    validate(engine, monitor, task, index, data.validation)
                number = 0 if last else interruption.agreed()
                if last or number or engine.step % job.train.checkpoint_every == 0:
                    engine.save(job.run)
            if number:
                raise Interrupted(number, engine.step)


def _announce(job: Job, engine: Engine, samples: int, validation: Index | None) -> None:
    """Log what may surprise about a training. samples: of all its training sets."""
    for line in doubts(job, samples, engine.world.ranks, engine.earlier_batch):
        _log.warning(line)
    if validation is None and job.name != "classify":  # which is never validated
        _log.info("no validation, since data.val is null: the last weights count as the best")


def _agreed(world: World, work: Callable[[], T]) -> T:
    """Return what `work` returns. A user error that it raises on one rank is raised on every rank."""
    error = result = None
    try:
        result = work()
    except Exception as caught:
        if not is_user_error(caught):
            raise
        error = caught
    if error := next(filter(None, world.gather(error)), None):
        raise error
    return cast(T, result)


def _check(job: Job, stream: StreamSettings) -> None:
    """Find mistakes in DeepSpeed's file, and too little shared memory, before the run directory is made."""
    deepspeed_settings(job.train, job.optim, job.prefix)
    stream.require_shared_memory()


def _claim(task: Task, world: World, resume: bool, data: Sequence[Index]) -> None:
    """Claim the run directory on rank 0."""
    run = task.job.run
    if world.rank:
        return
    inputs = [*(index.fingerprint for index in data), *task.inputs(data)]
    lock.check(run)
    if resume:
        require_same_batch(task.job, world.ranks)
    claim(task.job, resume)
    lock.take(run)
    claim_data(run, inputs)
