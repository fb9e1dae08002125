"""A plain folder of images, with a CSV of their labels and a folder of masks where there are any."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence
from pathlib import Path

from weakclip.data.index import ShardError
from weakclip.datasets.items import Item, check_files, image_names
from weakclip.labels import find_class

COLUMNS = ["file", "labels"]


def folder_items(images: Path, names: Sequence[str], labels: Path | None = None, masks: Path | None = None) -> list[Item]:
    """The JPEG and PNG files in `images` by name; `names` is the class list.

    labels: a CSV that has every image in a column `file` and its class names, parted by ";", in a column `labels`; the rows of
    an image add up. None: the images have no labels. masks: a folder of KEY.png, 8-bit class indices.
    Raises ShardError or OSError naming the file, and the line, that is at fault.
    """
    classes = _read_labels(labels, names) if labels else {}
    if labels:
        check_files(images, classes, labels)
    items = []
    for name in sorted(image_names(images)):
        key = Path(name).stem
        mask = masks / f"{key}.png" if masks else None
        if mask and not mask.is_file():
            raise ShardError(f"{mask}: no such mask; draw it, or leave --masks out")
        items.append(Item(key, images / name, tuple(sorted(classes[name])) if labels else None, mask=mask))
    return items


def _read_labels(file: Path, names: Sequence[str]) -> dict[str, set[int]]:
    """Class indices by file name."""
    found: dict[str, set[int]] = {}
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            if sorted(name for name in reader.fieldnames or () if name in COLUMNS) != COLUMNS:
                header = ",".join(reader.fieldnames or ())
                raise ShardError(f"{file}: line 1 must be the header {','.join(COLUMNS)}, is {header!r:.80}")
            for row in reader:
                where = f"{file}: line {reader.line_num}"
                if None in row or None in row.values():
                    raise ShardError(f"{where}: has not one field a column; part labels by ';', as in beach.jpg,person;boat")
                indices = found.setdefault(row["file"].strip(), set())
                indices |= {_class_index(label, names, where) for label in row["labels"].split(";") if label.strip()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise ShardError(f"{file}: not a CSV in UTF-8 ({error})") from None
    return found


def _class_index(label: str, names: Sequence[str], where: str) -> int:
    label = label.strip()
    index = find_class(label, names)
    if not index:  # nobody labels an image with its background
        near = difflib.get_close_matches(label, names[1:], n=1, cutoff=0.0)[0]
        raise ShardError(f"{where}: {label!r:.40} is none of the {len(names) - 1} classes; the nearest is {near!r}")
    return index
