"""A plain folder of images, with an optional CSV of their labels and an optional folder of masks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from weakclip.config import BuildConfig
from weakclip.data.index import ShardError
from weakclip.data.names import composed
from weakclip.datasets.files import check_listed, find_files, find_images, name_of, nested_image
from weakclip.datasets.items import Item, Listing
from weakclip.datasets.labels_csv import read_labels

_log = logging.getLogger(__name__)


def items(build: BuildConfig, target: Sequence[str]) -> Listing:
    """List the images that `build` describes; `target` is the class list of the new set."""
    labels, masks = (Path(path) if path else None for path in (build.labels, build.mask_dir))
    return Listing(target, folder_items(Path(str(build.images)), target, labels, masks, build.recursive))


def folder_items(
    images: Path, names: Sequence[str], labels: Path | None = None, masks: Path | None = None, recursive: bool = False
) -> list[Item]:
    """List the images in `images`, sorted by name; `names` is the class list.

    labels: a CSV that lists every image (weakclip.datasets.labels_csv). None: the images have no labels. masks: a folder of
    NAME.png, class indices. recursive: images, and their masks, may lie in subfolders.
    Raises ShardError or OSError naming the file and line at fault.
    """
    present = find_images(images, recursive)
    if not recursive and (nested := nested_image(images)):
        if not present:
            raise ShardError(f"{images}: holds no images, but its subfolders do, such as {nested}; add --recursive")
        _log.warning("%s: images in subfolders, such as %s, are not read; --recursive adds them", images, nested)
    if not present:
        raise ShardError(f"{images}: holds no JPEG, PNG or WebP image")
    drawn = find_files(masks, recursive) if masks else {}
    classes = read_labels(labels, names, present) if labels else {}
    if labels:
        check_listed(present, classes, images, labels)
    items = []
    for file, path in present.items():
        name = name_of(path, images)
        mask = drawn.get(f"{composed(name)}.png")
        if masks and not mask:
            raise ShardError(f"{masks / name}.png: no such mask; draw it, or leave --masks out")
        items.append(Item(name, path, tuple(sorted(classes[file])) if labels else None, mask=mask))
    return items
