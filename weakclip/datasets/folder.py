"""A plain folder of images, with an optional CSV of their labels and an optional folder of masks."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence
from pathlib import Path

from weakclip.config import BuildConfig
from weakclip.data.index import ShardError
from weakclip.datasets.items import Item, Listing, check_files, image_names
from weakclip.labels import find_class

COLUMNS = ["file", "labels"]


def items(build: BuildConfig, target: Sequence[str]) -> Listing:
    """List the images that `build` describes; `target` is the class list of the new set."""
    labels, masks = (Path(path) if path else None for path in (build.labels, build.mask_dir))
    return Listing(target, folder_items(Path(str(build.images)), target, labels, masks))


def folder_items(images: Path, names: Sequence[str], labels: Path | None = None, masks: Path | None = None) -> list[Item]:
    """List the JPEG and PNG files in `images`, sorted by name; `names` is the class list.

    labels: a CSV that has every image in a column `file` and its class names, separated by ";", in a column `labels`; the rows
    of an image add up. None: the images have no labels. masks: a folder of KEY.png, 8-bit class indices.
    Raises ShardError or OSError naming the file and line at fault.
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
    """Return the class indices by file name."""
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
                    raise ShardError(f"{where}: must have one field per column; separate labels by ';': beach.jpg,person;boat")
                indices = found.setdefault(row["file"].strip(), set())
                indices |= {_class_index(label, names, where) for label in row["labels"].split(";") if label.strip()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise ShardError(f"{file}: not a CSV in UTF-8 ({error})") from None
    return found


def _class_index(label: str, names: Sequence[str], where: str) -> int:
    label = label.strip()
    index = find_class(label, names)
    if not index:  # background (0) is not a label either
        near = difflib.get_close_matches(label, names[1:], n=1, cutoff=0.0)[0]
        raise ShardError(f"{where}: {label!r:.40} is not one of the {len(names) - 1} classes; the closest is {near!r}")
    return index
