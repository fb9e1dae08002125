"""Logging: plain lines on the terminal, and lines with time, rank and origin in files."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

NOISY = ("DeepSpeed", "deepspeed", "torch", "submitit", "filelock", "fsspec", "urllib3", "PIL")
"""Loggers of libraries whose notices and warnings go to the log file, but to the terminal only with -v. Errors always show."""

FOR_DEVELOPERS = ("FutureWarning: ", "DeprecationWarning: ")
"""Kinds of Python warnings that are of no use to a person who runs a command."""


class _Terminal(logging.Handler):
    """Writes to stderr without breaking a progress bar. Ranks other than 0 write only warnings and errors."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            rank = int(os.environ.get("RANK", 0))
            if rank and record.levelno < logging.WARNING:
                return
            level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            origin = f"rank {rank}: " if rank else ""
            tqdm.write(f"{level}{origin}{self.format(record).rstrip()}", file=sys.stderr)
        except Exception:
            self.handleError(record)


def set_up(verbosity: int = 0) -> None:
    """Send the log to the terminal. verbosity: -1 warnings and errors only, 0 also INFO, 1 also DEBUG and libraries' notices."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Terminal)]:
        root.removeHandler(handler)
    terminal = _Terminal()
    terminal.setLevel({-1: logging.WARNING, 0: logging.INFO}.get(verbosity, logging.DEBUG))
    if verbosity <= 0:
        terminal.addFilter(_is_ours_or_matters)
    root.addHandler(terminal)
    root.setLevel(logging.DEBUG if verbosity > 0 else logging.INFO)
    logging.captureWarnings(capture=True)  # Python's warnings are logged too, so that they are in the file


def _is_ours_or_matters(record: logging.LogRecord) -> bool:
    library = record.name.partition(".")[0]
    if library == "submitit":  # it writes its lines itself
        return False
    if library == "weakclip" or record.levelno >= logging.ERROR:
        return True
    if record.name == "py.warnings":
        return not any(kind in record.getMessage() for kind in FOR_DEVELOPERS)
    return record.levelno >= logging.WARNING and library not in NOISY


@contextmanager
def to_file(path: Path, rank: int) -> Iterator[None]:
    """Append everything that is logged in this context, also by libraries, to `path`, with time, rank, level and origin."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
