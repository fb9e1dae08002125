"""The table of all commands, and the arguments of those on a recipe: `--config FILE ... [--task INDEX] key=value ...`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from weakclip import labels, recipe, registry
from weakclip.config import Config, ConfigError
from weakclip.recipe import Sweep, is_sweep
from weakclip.runtime.command_line import Parser, run

__all__ = ["Parser", "main", "parse_config", "run"]


class Verb(NamedTuple):
    """A command of `weakclip`."""

    main: str
    """Import path of its main function; `python -m` runs its module as well."""
    summary: str


VERBS = {
    "build": Verb("weakclip.datasets.build:main", "build a shard set from images, labels and CAMs"),
    "verify": Verb("weakclip.datasets.verify:main", "check a shard set"),
    "show": Verb("weakclip.datasets.show:main", "draw samples of a shard set"),
    "stats": Verb("weakclip.datasets.stats:main", "count what a shard set holds"),
    "reshard": Verb("weakclip.datasets.reshard:main", "rewrite a shard set or foreign tars"),
    "cam": Verb("weakclip.cam:main", "make CAMs from image labels"),
    "train": Verb("weakclip.train:main", "train WeakCLIP (several ranks: torchrun -m weakclip.train)"),
    "pseudo": Verb("weakclip.pseudo:main", "write pseudo masks"),
    "retrain": Verb("weakclip.retrain:main", "train a segmentation network on the pseudo masks"),
    "test": Verb("weakclip.test:main", "test the retrained network"),
    "predict": Verb("weakclip.predict:main", "segment single images with a trained network"),
    "evaluate": Verb("weakclip.evaluate:main", "score masks, seeds or CAMs"),
    "report": Verb("weakclip.report:main", "print the paper's tables beside a run's figures"),
    "doctor": Verb("weakclip.doctor:main", "check libraries, GPUs, Slurm, and what a recipe needs"),
    "submit": Verb("weakclip.launch.submit:main", "send stages to Slurm, or to this machine"),
    "status": Verb("weakclip.launch.status:main", "show the state of a run's stages"),
    "sweep": Verb("weakclip.sweep:main", "list or run the tasks of a sweep"),
    "convert": Verb("weakclip.convert:main", "convert released checkpoints to ours and back"),
    "fidelity": Verb("weakclip.fidelity:main", "compare with the published implementation's numbers"),
    "parameters": Verb("weakclip.parameters:main", "count a model's parameters"),
    "demo": Verb("weakclip.demo.__main__:main", "run the whole pipeline on a synthetic world"),
}


def main(arguments: Sequence[str]) -> None:
    """Run the command that the first argument names."""
    width = max(map(len, VERBS))
    listed = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="weakclip",
        usage="weakclip COMMAND ...",
        description="From image-level labels to segmentation masks.",
        epilog=f"commands:\n{listed}\n\nweakclip COMMAND --help shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=VERBS, metavar="COMMAND", help="one of the commands below")
    chosen = parser.parse_args(arguments[:1]).command
    registry.load(VERBS[chosen].main)(arguments[1:])


def parse_config(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """Return the config given by `--config FILE` (once or more), `--task INDEX` and `key=value`, and the other options.

    Raises UserError for a mistake in any of them, or in the class list.
    """
    recipe_help = (
        "YAML recipe, such as configs/voc.yaml, or sweep; further files override it, such as configs/retrain/segformer.yaml"
    )
    parser.add_argument("--config", required=True, action="append", metavar="FILE", help=recipe_help)
    parser.add_argument("--task", type=int, metavar="INDEX", help="which task of a sweep (default: SLURM_ARRAY_TASK_ID)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe, such as train.batch=4")
    options = parser.parse_intermixed_args(list(arguments))
    if is_sweep(options.config[0]):
        sweep, *others = options.config
        if others:
            raise ConfigError(f"--config {others[0]}: {sweep} is a sweep and names its recipe itself; pass only the sweep")
        return Sweep.read(sweep).config(options.task, options.overrides), options
    config = recipe.load(options.config, options.overrides)
    if options.task is not None:
        raise ConfigError(f"--task {options.task}: {options.config[0]} is not a sweep, such as configs/sweeps/prompts.yaml")
    labels.class_names(config.classes)  # raises UserError here, before the command loads what takes seconds
    return config, options
