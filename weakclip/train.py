"""Train WeakCLIP, or with --stage the classifier before it or the segmentation network after it.

torchrun --nproc_per_node N -m weakclip.train --config configs/coco.yaml [--stage retrain] [--resume auto] [key=value ...]
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from weakclip import cli, registry
from weakclip.config import Config
from weakclip.runtime.signals import Interrupted, nothing_left_to_save
from weakclip.training import deepspeed_file
from weakclip.training.data import TrainingData
from weakclip.training.jobs import JOBS

_log = logging.getLogger(__name__)


def run(stage: str, config: Config, resume: bool) -> None:
    """Join the other ranks, train the job of a stage, and print where its results are. Raises what `train` raises."""
    job = JOBS[stage](config)
    data = TrainingData.open(job)  # before torch is loaded, so that a mistake in a file is found at once
    deepspeed_file.read(job.train)
    train = registry.load("weakclip.training.loop:train")
    world = registry.load("weakclip.training.world:World").join()
    try:
        train(job, data, world, resume)
        if world.rank == 0:
            print(f"trained: {job.run}/weights; curves: tensorboard --logdir {job.run.tensorboard}")
    except Interrupted as stop:
        if world.rank == 0:
            _log.warning(stop)
        raise
    finally:
        world.leave()


def main(arguments: Sequence[str], stage: str | None = None) -> None:
    """Train the job of `stage`; None: the option --stage names it."""
    parser = cli.Parser(prog=f"weakclip {stage or 'train'}", description="Train a network; several ranks: torchrun.")
    if stage is None:
        parser.add_argument("--stage", choices=JOBS, default="train", help="train: WeakCLIP (default)")
    parser.add_argument("--resume", choices=("auto", "never"), default="never", help="auto: resume the run, if there is one")
    config, options = cli.parse_config(parser, arguments)
    try:
        run(stage or options.stage, config, options.resume == "auto")
    except Interrupted:
        sys.exit(os.EX_TEMPFAIL)
    nothing_left_to_save()


if __name__ == "__main__":
    cli.run(main)
