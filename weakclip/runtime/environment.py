"""Running a command where the libraries may be missing, since its environment is not active. This imports none of them."""

from __future__ import annotations

import os
import sys
from importlib import import_module


def run(command: str) -> None:
    """Run the command whose main function is at `command`, such as "weakclip.cli:main", as command_line.run does.

    A library that is not installed ends it with one line, unless WEAKCLIP_TRACEBACK is set.
    """
    module, _, main = command.partition(":")
    try:
        command_line = import_module("weakclip.runtime.command_line")
        command_line.run(lambda arguments: getattr(import_module(module), main)(arguments))
    except ModuleNotFoundError as error:
        if os.environ.get("WEAKCLIP_TRACEBACK") or str(error.name).partition(".")[0] == "weakclip":
            raise
        print(
            f"error: {sys.executable} has no module {error.name!r}; activate the environment of the package first, such as with "
            ". .venv/bin/activate, or install what is missing in it",
            file=sys.stderr,
        )
        sys.exit(1)
