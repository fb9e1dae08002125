"""The index of a shard set: the position of each sample in the tar files (docs/data_format.md)."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from weakclip import labels
from weakclip.config import ConfigError, DataConfig
from weakclip.data.cache import File
from weakclip.data.names import LONGEST, key_of, names_a_file
from weakclip.data.storage import LocalStorage, RemoteStorage, Storage, StorageError
from weakclip.runtime.atomic import write_whole
from weakclip.runtime.errors import UserError

FORMAT = 1
INDEX = "index.json"
# A key becomes part of a member's name, up to the first dot. Sets of earlier versions may hold % in keys.
KEY = re.compile(rf"(?:(?![./\\])[ -~]){{1,{LONGEST}}}")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}\.tar")
REPAIR = "run shards/verify.py on the set, then copy or build it again"

T = TypeVar("T")


class ShardError(UserError):
    """A shard set, or input for one, is invalid or damaged. One line: the shard, the key, and a hint."""


def json_field(mapping: Any, name: str, kind: type[T], where: str) -> T:
    """Return `mapping[name]`, which must be a `kind`; JSON's true is not an int here. Raises ShardError naming `where`."""
    value = mapping.get(name) if isinstance(mapping, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ShardError(f"{where}: {name!r} is missing or not of type {kind.__name__}")
    return value


def is_count(value: Any) -> bool:
    """Return whether a JSON value is an integer of 0 or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True)
class Entry:
    """The position of one sample: `length` bytes from byte `offset` of the file `shard` are its tar members.

    original: the path of its image below the folder of images, without the suffix; None where it is the key.
    """

    shard: str
    key: str
    offset: int
    length: int
    original: str | None = None

    @property
    def name(self) -> str:
        """Path of the image below its folder, without the suffix. Masks are written under it."""
        return self.original or self.key

    @classmethod
    def parse(cls, shard: str, row: Any, where: str) -> Entry:
        """Return the entry in a row of index.json. Raises ShardError naming `where`."""
        key, offset, length, *rest = row if isinstance(row, list) and len(row) in (3, 4) else (None, 0, 0)
        named = not rest or (isinstance(rest[0], str) and names_a_file(rest[0]) and key_of(rest[0]) == key)
        if not (isinstance(key, str) and KEY.fullmatch(key) and named):
            raise ShardError(f"{where}: {row!r:.80} is not [key, offset, length] or [key, offset, length, name]; {REPAIR}")
        return cls(shard, key, offset, length, *rest)

    def as_row(self) -> list[Any]:
        """Return the entry as it is written in index.json."""
        return [self.key, self.offset, self.length, *([] if self.original is None else [self.original])]


@dataclass(frozen=True)
class Shard(File):
    """One tar file and its samples, in order."""

    samples: tuple[Entry, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the shard as it is written in index.json."""
        rows = [entry.as_row() for entry in self.samples]
        return {"name": self.name, "bytes": self.bytes, "sha256": self.sha256, "samples": rows}


@dataclass(frozen=True)
class Index:
    """A shard set: its storage, the class names by class index, and the shards."""

    storage: Storage
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]

    @classmethod
    def load(cls, path: str | Path, options: DataConfig | None = None) -> Index:
        """Read and check the index at `path`: a shard set's directory or URL, or that of its index.json.

        options: how to read from a URL. Raises ShardError when it is not an index of this format, when a key is listed twice,
        when a sample lies outside its shard, or when a shard file of a directory is missing or does not have the size in the
        index; StorageError when a URL cannot be read; ConfigError when the cache is too small for the shuffle window.
        """
        folder, _, name = str(path).rpartition("/")
        storage = Storage.of(folder if name == INDEX else path, options)
        file = f"{storage}/{INDEX}"
        try:
            raw = json.loads(storage.read(INDEX))
        except FileNotFoundError:
            raise ShardError(
                f"{file}: no such file; `python shards/build.py` makes a shard set, `python -m weakclip.cam` one with CAMs"
            ) from None
        except StorageError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise ShardError(f"{file}: cannot be read ({error}); {REPAIR}") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ShardError(f"{file}: not a shard index of format {FORMAT}; build the set again with this version")
        classes = json_field(raw, "classes", list, file)
        if not all(isinstance(c, str) for c in classes) or not 2 <= len(set(classes)) == len(classes) <= labels.IGNORE:
            raise ShardError(f"{file}: 'classes' must be 2 to {labels.IGNORE} different names")
        shards = tuple(parse_shard(item, file) for item in json_field(raw, "shards", list, file))
        index = cls(storage, tuple(classes), shards)
        index._check()
        if isinstance(storage, RemoteStorage):
            _check_cache(shards, options or DataConfig())
        return index

    def _check(self) -> None:
        for what, names in (("shard", [s.name for s in self.shards]), ("key", [e.key for e in self.entries])):
            if len(set(names)) < len(names):
                twice = next(name for name, count in Counter(names).items() if count > 1)
                raise ShardError(f"{self.storage}/{INDEX}: {what} {twice!r} is listed twice; it must be unique in a set")
        for shard in self.shards if isinstance(self.storage, LocalStorage) else ():
            file = self.root / shard.name
            size = file.stat().st_size if file.is_file() else None
            if size != shard.bytes:
                state = "missing" if size is None else f"{size} bytes long, not {shard.bytes}"
                raise ShardError(f"{file}: shard is {state}; copy it again, or build the set again")

    def save(self) -> None:
        """Write index.json into `root`. It also holds the keys of the wids reader, which `load` ignores."""
        shardlist = [{"url": shard.name, "nsamples": len(shard.samples), "filesize": shard.bytes} for shard in self.shards]
        wids = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shardlist}
        raw = {"format": FORMAT, "classes": self.classes, "shards": [shard.as_dict() for shard in self.shards], **wids}
        text = json.dumps(raw, separators=(",", ":"))
        write_whole(self.root / INDEX, text + "\n")

    @property
    def root(self) -> Path:
        """The set's directory. Raises ShardError for a set at a URL."""
        if not isinstance(self.storage, LocalStorage):
            raise ShardError(f"{self.storage}: this needs a shard set on a local disk; copy it there")
        return self.storage.root

    @cached_property
    def shard_of(self) -> dict[str, Shard]:
        """Shards by name."""
        return {shard.name: shard for shard in self.shards}

    @property
    def fingerprint(self) -> str:
        """SHA-256 that changes with the set's shards, their order and their number of samples."""
        return hashlib.sha256(json.dumps([(s.name, s.sha256, len(s.samples)) for s in self.shards]).encode()).hexdigest()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All samples of all shards, in order."""
        return tuple(entry for shard in self.shards for entry in shard.samples)


def _check_cache(shards: Sequence[Shard], options: DataConfig) -> None:
    window = sum(sorted(shard.bytes for shard in shards)[-options.shuffle_window :])
    if options.cache and window > options.cache_gib * 2**30:
        what = f"the {options.shuffle_window} largest shards are {window / 2**30:.3g} GiB and would be downloaded again and again"
        raise ConfigError(f"data.cache_gib={options.cache_gib:g}: {what}; raise it, or lower data.shuffle_window")


def parse_shard(raw: Any, file: str) -> Shard:
    """Return the shard in an entry of index.json, or of the index of an unfinished set. Raises ShardError naming `file`."""
    name = json_field(raw, "name", str, file)
    where = f"{file}: shard {name!r}"
    size, sha256 = json_field(raw, "bytes", int, where), json_field(raw, "sha256", str, where)
    if not _SHARD_NAME.fullmatch(name) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ShardError(f"{where}: not a shard's name, or not a SHA-256; {REPAIR}")
    entries, end = [], 0
    for row in json_field(raw, "samples", list, where):
        entry = Entry.parse(name, row, where)
        offset, length = entry.offset, entry.length
        if not (is_count(offset) and is_count(length) and end <= offset < offset + length <= size):
            raise ShardError(f"{where}: {entry.key}: bytes {offset!r:.20} + {length!r:.20} do not fit into its {size}; {REPAIR}")
        entries.append(entry)
        end = offset + length
    return Shard(name, size, sha256, tuple(entries))


def open_index(path: str, class_names: Sequence[str], options: DataConfig | None = None) -> Index:
    """Return the shard set at `path`, a directory or a URL that is read according to `options`.

    Raises as Index.load, and UserError when its class list is not `class_names`.
    """
    index = Index.load(path, options)
    labels.require_same(class_names, index.classes, str(index.storage))
    return index


def select_shards(index: Index, subset: str | None) -> list[Entry]:
    """Return the samples of the shards that `subset` selects: None for all, "3" for one, "0:8" for a range as in Python.

    Raises UserError when it is none of these or selects nothing.
    """
    numbers = select_numbers(len(index.shards), subset, str(index.storage))
    return [entry for number in numbers for entry in index.shards[number].samples]


def select_numbers(shards: int, subset: str | None, what: str) -> range:
    """Return which of `shards` shards `subset` selects, as in `select_shards`. what: name of the set, for the error message."""
    every = range(shards)
    try:
        first, *rest = (int(part) if part else None for part in (":" if subset is None else subset).split(":"))
        chosen = every[slice(first, *rest)] if rest else range(every[first], every[first] + 1)  # type: ignore[index]
    except (ValueError, IndexError, TypeError):
        chosen = range(0)
    if not chosen:
        raise UserError(f"--shards {subset}: {what} has shards 0..{shards - 1}; write 3 for one, 0:8 for a range")
    return chosen


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
