"""Atomic writing: a file is complete or absent."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which is renamed to `path` at the end: no reader or crash ever sees half a file.

    The temporary name is unique, since several jobs may write the same file. After an error nothing is left behind, and an
    OSError, such as that of a full disk, names `path`.
    """
    partial = path.with_name(f"{partial_prefix(path).name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # when writing fails; an error of opening has it
            error.filename = str(path)
        raise


def partial_prefix(path: Path) -> Path:
    """Return the path of temporary files for `path` without their two suffixes, .UNIQUE.partial."""
    name = os.fsencode(path.name)
    # A file system's limit is 255 bytes, of which the suffixes take 17.
    return path if len(name) <= 238 else path.with_name(hashlib.sha256(name).hexdigest())


def write_whole(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` atomically, as `whole` does."""
    with whole(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
