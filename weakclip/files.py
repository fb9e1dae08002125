"""Writing files that are whole or absent."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_whole(path: Path, data: bytes | str) -> None:
    """Write `path` under a temporary name, then rename it: neither a reader nor a crash ever sees half of it.

    The name is nobody else's, since several jobs may write the same file. Where the disk is full, nothing is left behind.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
