"""What counts as a user error: a mistake that the person at the command line can fix. It is shown as one line."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in a setting, a file or an option. The message is one line: what is wrong, where, and how to fix it."""


def is_user_error(error: BaseException) -> bool:
    """Return whether `error` is a user error: a UserError, or an OSError that names a file (missing, full disk, ...).

    Any other error is a bug of this program and keeps its traceback.
    """
    return isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None)


def one_line(error: BaseException) -> str:
    """Return the message of a user error: for one of the system, the file and what happened, without its number."""
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    return str(error).replace("\n", "\\n").replace("\r", "\\r")  # a file's name may hold any character
