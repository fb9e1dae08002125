"""Train WeakCLIP, or by --stage the network before it (classify) or after it (retrain).

torchrun --nproc_per_node N -m weakclip.train --config configs/coco.yaml [--stage retrain] [--resume auto] [key=value ...]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist

from weakclip import cli
from weakclip.data.index import Index, open_index
from weakclip.data.stream import training_batches
from weakclip.runtime import lock
from weakclip.runtime import run_dir as runs
from weakclip.runtime.signals import Interrupted, nothing_left_to_save
from weakclip.training.engine import Engine, World
from weakclip.training.interruption import Interruption
from weakclip.training.jobs import TASKS, Task
from weakclip.training.monitor import Monitor
from weakclip.training.validation import validate


def train(task: Task, world: World, resume: bool = False) -> Path:
    """Run a training job, on all ranks; returns its run directory.

    Raises ValueError (ConfigError, ShardError) for what the user can mend, Interrupted when a signal asked it to stop.
    """
    try:
        return _train(task, world, resume)
    finally:
        if world.rank == 0:
            lock.release(task.run)


def _train(task: Task, world: World, resume: bool) -> Path:
    config, names = task.config, task.names
    index = open_index(config.data.train, names, config.data)
    mixed = [open_index(path, names, config.data) for path in config.data.mix]
    validation = open_index(config.data.val, names, config.data) if config.data.val else None
    run = _claim(task, world, resume, (index, *mixed))
    torch.manual_seed(config.seed)
    latest = runs.checkpoints(run)[-1:] if resume else []
    engine = Engine(task.build(pretrained=True), config, world, *latest)
    monitor = Monitor(run, config, engine)
    interruption = Interruption()
    # Closing ends the loader's processes at once, not when Python comes to it.
    stream = training_batches(index, config, task.target, engine.consumed, world.rank, world.ranks, mixed)
    with closing(stream) as batches:
        while engine.step < config.train.steps:
            with monitor.waiting():
                micro_batches = list(islice(batches, config.train.accumulate))
            monitor.step(micro_batches, engine.train_step(micro_batches))
            last = engine.step == config.train.steps
            with monitor.pausing():
                if last or engine.step % config.train.validate_every == 0:
                    validate(engine, monitor, task, index, validation)
                number = 0 if last else interruption.agreed()
                if last or number or engine.step % config.train.checkpoint_every == 0:
                    engine.save(run)
            if number:
                raise Interrupted(number, engine.step)
    monitor.close()
    return run


def _claim(task: Task, world: World, resume: bool, data: Sequence[Index]) -> Path:
    """Rank 0 takes the run directory; all hear of what is wrong with it."""
    error = None
    if world.rank == 0:
        try:
            inputs = [*(index.fingerprint for index in data), *task.inputs(data)]
            lock.check(task.run)
            runs.claim(task.config, task.fixed, resume)
            lock.take(task.run)
            runs.claim_data(task.run, inputs)
        except ValueError as caught:
            error = caught
    if error := world.gather(error)[0]:
        raise error
    return task.run


def run(task: Task, resume: bool) -> None:
    """The stage: join the other ranks, train, and say what came of it. Raises what `train` raises."""
    world = World.join()
    try:
        folder = train(task, world, resume)
        if world.rank == 0:
            print(f"trained: {folder}/weights; look at it with: tensorboard --logdir {folder}/tensorboard")
    except Interrupted as stop:
        if world.rank == 0:
            print(stop, file=sys.stderr)
        raise
    finally:
        dist.destroy_process_group()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m weakclip.train", description="Train a network; see also torchrun.")
    parser.add_argument("--stage", choices=TASKS, default="train", help="train: WeakCLIP (default)")
    parser.add_argument("--resume", choices=("auto", "never"), default="never", help="auto: go on with the run, if there is one")
    config, options = cli.parse_config(parser, arguments)
    try:
        run(TASKS[options.stage](config), options.resume == "auto")
    except Interrupted:
        sys.exit(os.EX_TEMPFAIL)
    nothing_left_to_save()


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
