"""Finding the files of a data set. Names are compared in Unicode's normal form C, so it does not matter who wrote them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from weakclip.data.index import ShardError
from weakclip.data.names import composed

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
OTHERS = (".tif", ".tiff", ".bmp", ".gif", ".avif", ".heic", ".heif", ".jp2", ".jxl")

_log = logging.getLogger(__name__)


def find_images(directory: Path, recursive: bool = False) -> dict[str, Path]:
    """Return the JPEG, PNG and WebP files in a directory, or below it, by their composed path below it, in order of these.

    They are recognised by their suffix. Images of other formats are named in one warning. Raises ShardError for two files whose
    names are the same in normal form C, and OSError where the directory cannot be read.
    """
    files = list(_walk(directory, "", recursive))
    others = sorted(path for _, path in files if path.suffix.lower() in OTHERS)
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in Counter(path.suffix.lower() for path in others).items())
        hint = f"convert them to PNG or JPEG, such as by: magick mogrify -format png *{others[0].suffix}"
        _log.warning("%s: %d images are not read (%s, such as %s); %s", directory, len(others), kinds, others[0].name, hint)
    return dict(sorted(_by_name((name, path) for name, path in files if path.suffix.lower() in SUFFIXES).items()))


def find_files(directory: Path, recursive: bool = False) -> dict[str, Path]:
    """Return all files in a directory, or below it, by their composed path below it. Raises as `find_images`."""
    return _by_name(_walk(directory, "", recursive))


def name_of(image: Path, directory: Path) -> str:
    """Return the name of an image: its path below a directory, without the suffix (weakclip.data.names)."""
    return image.relative_to(directory).as_posix()[: -len(image.suffix)]


def nested_image(directory: Path) -> Path | None:
    """Return an image in a subfolder of a directory, if there is one that can be read."""
    for folder in (Path(entry.path) for entry in os.scandir(directory) if entry.is_dir()):
        try:
            if found := next((path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES), None):
                return found
        except OSError:
            continue
    return None


def _by_name(files: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name, path in files:
        if (other := found.setdefault(composed(name), path)) is not path:
            raise ShardError(f"{path}: {other.name} is the same name in another Unicode form; rename or drop one")
    return found


def _walk(
    directory: Path, below: str, recursive: bool, above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple[str, Path]]:
    """Yield the files in a directory, or below it, with their path below it. A link to a folder above is not followed."""
    for entry in os.scandir(directory):
        if entry.is_file():
            yield f"{below}{entry.name}", directory / entry.name
        elif recursive and entry.is_dir() and (place := _place(entry)) not in above:
            yield from _walk(directory / entry.name, f"{below}{entry.name}/", recursive, above | {place})


def _place(entry: os.DirEntry[str]) -> tuple[int, int]:
    """Return what tells a folder from all others, whichever links lead to it."""
    found = entry.stat()
    return found.st_dev, found.st_ino


def check_listed(present: Mapping[str, Path], listed: Collection[str], directory: Path, listing: Path) -> None:
    """Raise ShardError unless the images in `directory` are exactly those that the file `listing` lists, by composed name."""
    if missing := set(listed) - present.keys():
        raise ShardError(f"{directory / min(missing)}: no such JPEG, PNG or WebP image{_more(missing)}, but {listing} lists it")
    if unlisted := present.keys() - set(listed):
        raise ShardError(f"{directory / min(unlisted)}: {listing} does not list this image{_more(unlisted)}")


def _more(names: Collection[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
