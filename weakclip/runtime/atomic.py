"""Writing files that are whole or absent."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name to write, which becomes `path` in the end: neither a reader nor a crash ever sees half of it.

    The name is nobody else's, since several jobs may write the same file. An error leaves nothing behind, and an OSError, such as
    that of a full disk, names `path`.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # as when writing fails, unlike opening
            error.filename = str(path)
        raise


def write_whole(path: Path, data: bytes | str) -> None:
    """Write `path`, as `whole` does."""
    with whole(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
