"""What every command line shares: `--config FILE key=value ...`, and one clear line for a user's mistake."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from weakclip import config as configs


def parse_config(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[configs.Config, argparse.Namespace]:
    """The config that `--config FILE` and `key=value` arguments make, and the parser's other arguments."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML recipe, such as configs/voc.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, such as train.batch=4")
    options = parser.parse_intermixed_args(list(arguments))
    return configs.load(options.config, options.overrides), options


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
