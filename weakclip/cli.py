"""What every command line shares: `--config FILE ... [--task INDEX] key=value ...`, and one clear line for a user's mistake."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from weakclip import config as configs
from weakclip.sweep import Sweep, is_sweep


def parse_config(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[configs.Config, argparse.Namespace]:
    """The config that `--config FILE` (once or more), `--task INDEX` and `key=value` make, and the parser's other arguments.

    Raises ConfigError for a mistake in any of them.
    """
    recipe = "YAML recipe, such as configs/voc.yaml, or sweep; again: what changes it, such as configs/retrain/segformer.yaml"
    parser.add_argument("--config", required=True, action="append", metavar="FILE", help=recipe)
    parser.add_argument("--task", type=int, metavar="INDEX", help="which task of a sweep (default: SLURM_ARRAY_TASK_ID)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, such as train.batch=4")
    options = parser.parse_intermixed_args(list(arguments))
    if is_sweep(options.config[0]):
        sweep, *others = options.config
        if others:
            raise configs.ConfigError(f"--config {others[0]}: {sweep} is a sweep, whose recipe is in it")
        return Sweep.read(sweep).config(options.task, options.overrides), options
    config = configs.load(options.config, options.overrides)
    if options.task is not None:
        raise configs.ConfigError(f"--task {options.task}: {options.config[0]} is no sweep, such as configs/sweeps/prompts.yaml")
    return config, options


def run(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> None:
    """Call `main`; a user's mistake (ValueError, OSError) becomes one line on stderr and exit code 1.

    WEAKCLIP_TRACEBACK=1 shows the traceback instead.
    """
    try:
        main(arguments)
    except (ValueError, OSError) as error:
        if os.environ.get("WEAKCLIP_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
