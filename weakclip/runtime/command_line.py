"""What all commands share: the options -v and -q, one line for a user error, a traceback for a bug."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from weakclip.runtime import log
from weakclip.runtime.errors import is_user_error, one_line


class Parser(argparse.ArgumentParser):
    """An argument parser with -v and -q, which take effect as they are parsed. A mistake is one line, without the usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument("-v", "--verbose", action=_Verbosity, const=1, help="show details and messages of libraries")
        self.add_argument("-q", "--quiet", action=_Verbosity, const=-1, help="show only warnings and errors")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


class _Verbosity(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, const: int, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, const=const, default=argparse.SUPPRESS, help=help)

    def __call__(self, *_: object) -> None:
        log.set_up(self.const)


# ---------------------------------------------------------------------------- types of options, whose errors name the option


def input_folder(text: str) -> Path:
    """Return the path of a folder that must exist."""
    return _require(Path(text), Path(text).is_dir(), "no such folder")


def shard_set(text: str) -> str:
    """Return the URL of a shard set, or its path, which must exist."""
    _require(Path(text), "://" in text or Path(text).exists(), "no such shard set")
    return text


def output_file(text: str) -> Path:
    """Return the path of a file to write. The folders above it need not exist: create them before writing."""
    path = _require(Path(text), not Path(text).is_dir(), "is a folder; name a file")
    return _require(path, not any(parent.is_file() for parent in path.parents), "lies in a file, not in a folder")


def output_folder(text: str) -> Path:
    """Return the path of a folder to write to. Neither it nor the folders above it need exist."""
    path = Path(text)
    return _require(path, not any(each.is_file() for each in (path, *path.parents)), "is or lies in a file; name a folder")


def _require(path: Path, condition: bool, problem: str) -> Path:
    if not condition:
        raise argparse.ArgumentTypeError(f"{path}: {problem}")
    return path


# ------------------------------------------------------------------------------------------------------------------ running


def run(main: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> None:
    """Call `main` with the command line's arguments. A user error becomes one line on stderr and exit code 1.

    A closed pipe on stdout, as in `weakclip report RUN | head`, ends the command quietly. Any other error is a bug and keeps its
    traceback. WEAKCLIP_TRACEBACK=1 shows the traceback of user errors as well.
    """
    log.set_up()
    try:
        main(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush fails, and says so
        sys.exit(1)
    except Exception as error:
        if os.environ.get("WEAKCLIP_TRACEBACK") or not is_user_error(error):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _stdout_is_closed() -> bool:
    """Return whether stdout is a pipe whose reader is gone."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are reported whatever is asked for
    return bool(poll.poll(0))
