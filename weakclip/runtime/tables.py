"""Tables as aligned text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table: text is aligned to the left, numbers to the right; a missing number (None, NaN) is shown as "-"."""

    title: str
    """Line above the table; empty: none."""
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    digits: int = 1
    """Decimals of fractional numbers."""

    def has_figures(self) -> bool:
        """Return whether any cell is a number."""
        return any(isinstance(cell, (int, float)) for row in self.rows for cell in row)

    def __str__(self) -> str:
        lines = [list(self.header), *([self._text(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = [any(isinstance(cell, str) for cell in column) for column in zip(*self.rows, strict=True)]
        padded = (
            "  ".join(f"{text:{'<' if is_left else '>'}{width}}" for text, width, is_left in zip(line, widths, left, strict=True))
            for line in lines
        )
        return "\n".join([*([self.title] if self.title else []), *(line.rstrip() for line in padded)])

    def _text(self, cell: Cell) -> str:
        if isinstance(cell, float):
            return "-" if math.isnan(cell) else f"{cell:.{self.digits}f}"
        return "-" if cell is None else str(cell)


def spread(values: Sequence[float]) -> str | None:
    """Return "mean ± std"; for a single value only that value; None for no values."""
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else None
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
