"""Shared memory, by which loader processes hand over batches: /dev/shm, of which a container has 64 MiB unless told otherwise."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from weakclip.runtime.errors import UserError

FOLDER = Path("/dev/shm")

_SIGNS = ("shared memory", "unable to write to file </torch_", "Bus error")
"""Parts of torch's messages when it is exhausted."""


def require(size: int, folder: Path = FOLDER) -> None:
    """Raise UserError where the loaders of a node need more bytes than `folder` has in total, whatever uses it now."""
    if not folder.is_dir():  # other systems have no such folder
        return
    found = os.statvfs(folder)
    if size > (whole := found.f_frsize * found.f_blocks):
        need = f"the batches of the loader processes need {_mib(size)} of it"
        raise UserError(f"{folder}: shared memory is {_mib(whole)}, and {need}; {_cure(size)}")


def exhausted(error: BaseException) -> UserError | None:
    """Return the user error for what a loader raises when shared memory is used up; None for another error."""
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None
    if full or any(sign in str(error) for sign in _SIGNS):
        return UserError(f"{FOLDER}: a loader process found no room for a batch in shared memory; {_cure(0)}")
    return None


def _cure(size: int) -> str:
    gib = max(1, -(-2 * size // 2**30))  # twice that, for others that use it, such as NCCL
    return f"start the container with --shm-size={gib}g or --ipc=host, or set data.workers=0"


def _mib(size: int) -> str:
    return f"{size / 2**20:.3g} MiB"
