"""Tables as aligned text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Text stands to the left, numbers to the right with one decimal, and "-" where there is none (None, NaN)."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def has_figures(self) -> bool:
        return any(isinstance(cell, (int, float)) for row in self.rows for cell in row)

    def __str__(self) -> str:
        lines = [list(self.header), *(list(map(_text, row)) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = [any(isinstance(cell, str) for cell in column) for column in zip(*self.rows, strict=True)]
        padded = (
            "  ".join(f"{text:{'<' if is_left else '>'}{width}}" for text, width, is_left in zip(line, widths, left, strict=True))
            for line in lines
        )
        return "\n".join([self.title, *(line.rstrip() for line in padded)])


def _text(cell: Cell) -> str:
    if isinstance(cell, float):
        return "-" if math.isnan(cell) else f"{cell:.1f}"
    return "-" if cell is None else str(cell)
