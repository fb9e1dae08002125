"""A CSV of image labels, in the dialects that spreadsheets and other tools write."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from weakclip.data.index import ShardError
from weakclip.data.names import composed
from weakclip.labels import find_class, index_of, read_text

FILE = ("file", "filename", "file_name", "image", "path")
LABELS = ("labels", "label", "classes", "class")
"""Names of the two columns, in any case; the first of each is the one that the documentation uses."""

_DELIMITERS = ",;\t"
_SEPARATORS = ";|,"


class _Layout(NamedTuple):
    """Which columns are read, by number."""

    delimiter: str
    file: int
    labels: int | None
    """The column with an image's labels; None where there is one column a class."""
    columns: list[str]


def read_labels(file: Path, names: Sequence[str], present: Collection[str]) -> dict[str, set[int]]:
    """Return the class indices of each image, by composed file name; the rows of an image add up.

    names: the class list. present: files that exist. Spaces around a file's name are dropped unless a file is called so.

    The delimiter is a comma, a semicolon or a tab. Labels are class names in one column, separated by ; or | or a comma, or there
    is a column of 0 and 1 for each class. Raises ShardError naming the file and line at fault.
    """
    found: dict[str, set[int]] = {}
    try:
        text = read_text(file, ShardError)
        layout = _layout(text, file, names)
        rows = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=layout.delimiter)
        next(rows)
        for row in rows:
            where = f"{file}: line {rows.line_num}"
            if not row:
                continue
            if len(row) != len(layout.columns):
                raise ShardError(f"{where}: must have one field per column; separate labels by ';': beach.jpg,person;boat")
            name = composed(row[layout.file])
            indices = found.setdefault(name if name in present else name.strip(), set())
            indices.update(_classes(row, layout, names, where))
    except csv.Error as error:
        raise ShardError(f"{file}: not a CSV ({error})") from None
    return found


def _layout(text: str, file: Path, names: Sequence[str]) -> _Layout:
    for delimiter in _DELIMITERS:
        columns = [column.strip() for column in next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])]
        lowered = [column.lower() for column in columns]
        files, labels = (_called(lowered, known) for known in (FILE, LABELS))
        classes = [column for n, column in enumerate(columns) if find_class(column, names) and n not in (*files, *labels)]
        if len(files) == 1 and len(labels) == 1:
            if classes:
                raise ShardError(f"{file}: line 1 has a column of labels and one for the class {classes[0]!r}; keep one kind")
            return _Layout(delimiter, files[0], labels[0], columns)
        if len(files) == 1 and not labels and classes:
            _check_columns([column for n, column in enumerate(columns) if n != files[0]], names, f"{file}: line 1")
            return _Layout(delimiter, files[0], None, columns)
    header = text.partition("\n")[0].strip()
    raise ShardError(f"{file}: line 1 must be the header file,labels or have a column for each class, is {header!r:.80}")


def _called(columns: Sequence[str], known: Sequence[str]) -> list[int]:
    """Return the numbers of the columns that are called by the first of the names `known`, or else by another of them."""
    return [n for n, column in enumerate(columns) if column == known[0]] or [
        n for n, column in enumerate(columns) if column in known
    ]


def _check_columns(columns: Sequence[str], names: Sequence[str], where: str) -> None:
    """Raise ShardError unless there is one column for each class."""
    indices = [index_of(column, names, where, ShardError) for column in columns]
    if twice := next((column for column, index in zip(columns, indices, strict=True) if indices.count(index) > 1), None):
        raise ShardError(f"{where}: two columns are for the class {twice!r}")
    if missing := {*range(1, len(names))} - {*indices}:
        raise ShardError(f"{where}: has no column for the class {names[min(missing)]!r}")


def _classes(row: Sequence[str], layout: _Layout, names: Sequence[str], where: str) -> Iterator[int]:
    if layout.labels is not None:
        for label in _split(row[layout.labels].strip(), names):
            yield index_of(label, names, where, ShardError)
        return
    for number, (column, value) in enumerate(zip(layout.columns, row, strict=True)):
        if number != layout.file:
            if value.strip() not in ("0", "1"):
                raise ShardError(f"{where}: column {column!r} must be 0 or 1, is {value!r:.40}")
            if value.strip() == "1":
                yield index_of(column, names, where, ShardError)


def _split(field: str, names: Sequence[str]) -> list[str]:
    """Return the labels in a field. A separator within a class's own name does not count."""
    ways = [[field], *([label.strip() for label in field.split(separator)] for separator in _SEPARATORS)]
    filled = [[label for label in labels if label] for labels in ways]
    return next((labels for labels in filled if all(find_class(label, names) for label in labels)), filled[1])
