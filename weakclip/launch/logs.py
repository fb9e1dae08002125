"""The logs of a job's tasks in its folder."""

from __future__ import annotations

from pathlib import Path


def files(folder: Path, job: str) -> list[Path]:
    """List the logs of a job and of its array's tasks that are not empty, the most recently written one last."""
    found = [path for path in folder.glob(f"{job}_*_log.*") if path.stat().st_size]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def last_line(folder: Path, job: str) -> str:
    """Return the newest recent error line ("error: ..."), or else the newest line; "" without any line."""
    newest = [_lines(path) for path in files(folder, job)]
    errors = [line for lines in newest for line in lines[-30:] if line.startswith("error: ")]
    return (errors or [lines[-1] for lines in newest if lines] or [""])[-1]


def _lines(path: Path) -> list[str]:
    """Return the last lines, without submitit's own. Each redraw of a progress bar is a line."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 20_000, 0))
        text = file.read().decode(errors="replace").replace("\r", "\n")
    return [line for line in text.splitlines() if line.strip() and not line.startswith(("submitit INFO", "submitit ERROR"))]
