"""Finding the files of a data set. Names are compared in Unicode's normal form C, so it does not matter who wrote them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from weakclip.data.index import ShardError
from weakclip.data.names import composed

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
OTHER_IMAGES = (".tif", ".tiff", ".bmp", ".gif", ".avif", ".heic", ".heif", ".jp2", ".jxl")

_log = logging.getLogger(__name__)


def find_images(directory: Path, recursive: bool = False) -> dict[str, Path]:
    """Return the JPEG, PNG and WebP files in a directory, or below it, by their composed path below it, in order of these.

    They are recognised by their suffix. Images of other formats are named in one warning. Raises ShardError for two files whose
    names are the same in normal form C, and where there are only images that cannot be read or that lie in subfolders.
    """
    images: dict[str, Path] = {}
    others = []
    for path in _walk(directory, recursive):
        suffix = path.suffix.lower()
        if suffix in IMAGES:
            name = composed(path.relative_to(directory).as_posix())
            if name in images:
                raise ShardError(f"{path}: another file has the same name in another Unicode form; rename or drop one")
            images[name] = path
        elif suffix in OTHER_IMAGES:
            others.append(path)
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in Counter(path.suffix.lower() for path in others).items())
        hint = f"convert them to PNG or JPEG, such as by: magick mogrify -format png *{min(others).suffix}"
        _log.warning("%s: %d images are not read (%s, such as %s); %s", directory, len(others), kinds, min(others).name, hint)
    if not recursive and (nested := _nested_image(directory)):
        if not images:
            raise ShardError(f"{directory}: holds no images, but its subfolders do, such as {nested}; add --recursive")
        _log.warning("%s: images in subfolders, such as %s, are not read; --recursive adds them", directory, nested)
    return dict(sorted(images.items()))


def find_files(directory: Path, recursive: bool = False) -> dict[str, Path]:
    """Return all files in a directory, or below it, by their composed path below it."""
    return {composed(path.relative_to(directory).as_posix()): path for path in _walk(directory, recursive)}


def name_of(image: Path, directory: Path) -> str:
    """Return the name of an image: its path below a directory, without the suffix (weakclip.data.names)."""
    return image.relative_to(directory).as_posix()[: -len(image.suffix)]


def _walk(directory: Path, recursive: bool) -> Iterator[Path]:
    """Yield the files in a directory, or below it. Raises OSError where it cannot be read."""
    for entry in os.scandir(directory):
        if entry.is_file():
            yield Path(entry.path)
        elif recursive and entry.is_dir():
            yield from _walk(Path(entry.path), recursive)


def _nested_image(directory: Path) -> Path | None:
    """Return an image in a subfolder of a directory, if there is one."""
    folders = (Path(entry.path) for entry in os.scandir(directory) if entry.is_dir())
    return next((path for folder in folders for path in _walk(folder, True) if path.suffix.lower() in IMAGES), None)


def check_listed(present: Mapping[str, Path], listed: Collection[str], directory: Path, listing: Path) -> None:
    """Raise ShardError unless the images in `directory` are exactly those that the file `listing` lists, by composed name."""
    if missing := set(listed) - present.keys():
        raise ShardError(f"{directory / min(missing)}: no such JPEG, PNG or WebP image{_more(missing)}, but {listing} lists it")
    if unlisted := present.keys() - set(listed):
        raise ShardError(f"{directory / min(unlisted)}: {listing} does not list this image{_more(unlisted)}")


def _more(names: Collection[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
