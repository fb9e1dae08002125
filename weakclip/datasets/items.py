"""Data sets as lists of items: shared by coco.py, voc.py and folder.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

from weakclip.data.index import ShardError
from weakclip.data.names import composed, key_of
from weakclip.datasets.files import find_files


class Readable(Protocol):
    """A file, or an object that produces the bytes of one."""

    def read_bytes(self) -> bytes: ...


@dataclass(frozen=True)
class Item:
    """One image of a data set and the files of its parts.

    name: the image's path below its folder, without the suffix (weakclip.data.names). classes: indices in the data set's own
    class list; None where there are no labels, as for test images. mask: an image of such indices. size_HW: the (H, W) that the
    annotations are for, None if they do not give it. orientation: EXIF orientation by which the image is to be turned; 1: it
    is used as it is stored. stored: those of the parts "mask", "seed" and "cam" that follow the stored pixels, and turn too.
    """

    name: str
    image: Path
    classes: tuple[int, ...] | None
    cam: Path | None = None
    seed: Path | None = None
    mask: Readable | None = None
    size_HW: tuple[int, int] | None = None
    orientation: int = 1
    stored: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The key of the item's sample."""
        return key_of(self.name)


class Listing(NamedTuple):
    """The images of a data set."""

    classes: Sequence[str]
    """The class list of their labels, masks and CAMs."""
    items: list[Item]


def labelled(items: Sequence[Item], class_map: Sequence[int]) -> list[Item]:
    """Return the items that keep a label after `class_map`, and those of unlabelled sets (classes: None).

    Raises ShardError when two items have the same name, as an image and a copy of it in another format have, and when the mask
    of one could not be written because a folder has its name.
    """
    first: dict[str, Item] = {}
    for item in items:
        if (other := first.setdefault(item.key, item)) is not item:
            raise ShardError(f"{item.image}: has the same name without its suffix as {other.image}; rename or drop one of them")
    folders = {folder.as_posix(): item for item in items for folder in PurePosixPath(item.name).parents}
    for file in ("about.json", *(f"{item.name}{suffix}" for item in items for suffix in (".png", ".npz"))):
        if inside := folders.get(file):
            raise ShardError(f"{inside.image}: its folder would have the name of another file, {file}; rename the folder")
    return [item for item in items if item.classes is None or any(class_map[index] for index in item.classes)]


def with_cams(items: Sequence[Item], directory: Path) -> list[Item]:
    """Return the items with their NAME.npy or NAME.npz (maps) and NAME.png (a seed mask) in `directory`; each has at least one.

    Raises ShardError where there is neither, where there are two files of maps, and for an image without labels.
    """
    files = find_files(directory, recursive=any("/" in item.name for item in items))
    return [_with_cam(item, directory, files) for item in items]


def _with_cam(item: Item, directory: Path, files: Mapping[str, Path]) -> Item:
    if item.classes is None:
        raise ShardError(f"{item.image}: has no labels, but a CAM needs them; leave --cams out")
    *maps, seed = (files.get(f"{composed(item.name)}{suffix}") for suffix in (".npy", ".npz", ".png"))
    if all(maps):
        raise ShardError(f"{maps[0]}: {item.name}.npz exists too; keep one of them")
    if not any(maps) and not seed:
        raise ShardError(f"{directory / item.name}.npy: no such file, nor .npz or .png; make the CAM of this image first")
    return replace(item, cam=maps[0] or maps[1], seed=seed)


def version(item: Item) -> str:
    """Return a string that changes when one of the item's files does. Raises OSError naming a file that is missing."""
    files = [path.stat() for path in (item.image, item.cam, item.seed, item.mask) if isinstance(path, Path)]
    return repr((item, [(file.st_size, file.st_mtime_ns) for file in files]))
