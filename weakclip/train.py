"""Train WeakCLIP.

torchrun --nproc_per_node N -m weakclip.train --config configs/coco.yaml [--resume auto] [key=value ...]
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

from weakclip import cli, labels, lock
from weakclip import run as runs
from weakclip.config import Config
from weakclip.data.stream import open_index, training_batches
from weakclip.engine import Engine, World
from weakclip.interrupt import Interrupted, Interruption
from weakclip.model import WeakCLIP
from weakclip.monitor import Monitor
from weakclip.validation import validate


def train(config: Config, world: World, resume: bool = False) -> Path:
    """Run the job that `config` describes, on all ranks; returns the run directory.

    Raises ValueError (ConfigError, ShardError) for what the user can mend, Interrupted when a signal asked it to stop.
    """
    try:
        return _train(config, world, resume)
    finally:
        if world.rank == 0:
            lock.release(Path(config.run))


def _train(config: Config, world: World, resume: bool) -> Path:
    names = labels.class_names(config.classes)
    index = open_index(config.data.train, names, config.data)
    mixed = [open_index(path, names, config.data) for path in config.data.mix]
    validation = open_index(config.data.val, names, config.data) if config.data.val else None
    run = _claim(config, world, resume, [each.fingerprint for each in (index, *mixed)])
    torch.manual_seed(config.seed)
    latest = runs.checkpoints(run)[-1:] if resume else []
    engine = Engine(WeakCLIP(config, names), config, world, *latest)
    monitor = Monitor(run, config, engine)
    interruption = Interruption()
    # Closing ends the loader's processes at once, not when Python comes to it.
    with closing(training_batches(index, config, engine.consumed, world.rank, world.ranks, mixed)) as batches:
        while engine.step < config.train.steps:
            with monitor.waiting():
                micro_batches = list(islice(batches, config.train.accumulate))
            monitor.step(micro_batches, engine.train_step(micro_batches))
            last = engine.step == config.train.steps
            with monitor.pausing():
                if last or engine.step % config.train.validate_every == 0:
                    validate(engine, monitor, config, run, index, validation)
                number = 0 if last else interruption.agreed()
                if last or number or engine.step % config.train.checkpoint_every == 0:
                    engine.save(run)
            if number:
                raise Interrupted(number, engine.step)
    monitor.close()
    return run


def _claim(config: Config, world: World, resume: bool, data: Sequence[str]) -> Path:
    """Rank 0 takes the run directory; all hear of what is wrong with it."""
    error = None
    if world.rank == 0:
        try:
            lock.check(Path(config.run))
            runs.claim(config, resume)
            lock.take(Path(config.run))
            runs.claim_data(Path(config.run), data)
        except ValueError as caught:
            error = caught
    if error := world.gather(error)[0]:
        raise error
    return Path(config.run)


def run(config: Config, resume: bool) -> None:
    """The stage: join the other ranks, train, and say what came of it. Raises what `train` raises."""
    world = World.join()
    try:
        folder = train(config, world, resume)
        if world.rank == 0:
            print(f"trained: {folder}/weights; look at it with: tensorboard --logdir {folder}/tensorboard")
    except Interrupted as stop:
        if world.rank == 0:
            print(stop, file=sys.stderr)
        raise
    finally:
        dist.destroy_process_group()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m weakclip.train", description="Train WeakCLIP; see also torchrun.")
    parser.add_argument("--resume", choices=("auto", "never"), default="never", help="auto: go on with the run, if there is one")
    config, options = cli.parse_config(parser, arguments)
    try:
        run(config, options.resume == "auto")
    except Interrupted:
        sys.exit(os.EX_TEMPFAIL)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
