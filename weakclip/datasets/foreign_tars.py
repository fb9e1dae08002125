"""Tar shards of any origin: members are grouped into samples by name, in any order and any tar dialect."""

from __future__ import annotations

import gzip
import math
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from weakclip.data.index import ShardError
from weakclip.data.names import key_of
from weakclip.data.sample import PackedSample
from weakclip.datasets.foreign_parts import is_ours, part_of, with_json

GZIPPED = (".tar.gz", ".tgz")


@dataclass(frozen=True)
class ForeignSample:
    """One sample of a tar file. members: part, offset and size in bytes of its data. left_out: parts that our format has not."""

    tar: Path
    key: str
    members: tuple[tuple[str, int, int], ...]
    left_out: tuple[str, ...] = ()

    @property
    def parts(self) -> set[str]:
        """The parts that are read."""
        return {part for part, _, _ in self.members}


def tar_files(directory: Path) -> list[Path]:
    """List the tar files in a directory by name, plain or gzipped. Raises ShardError where there are none, or another archive."""
    names = sorted(path for path in directory.iterdir() if path.is_file())
    if packed := next((path for path in names if ".tar." in path.name and not path.name.endswith(GZIPPED)), None):
        raise ShardError(f"{packed}: is compressed, but not by gzip; decompress it to a plain .tar first")
    if not (tars := [path for path in names if path.name.endswith((".tar", *GZIPPED))]):
        raise ShardError(f"{directory}: holds neither an index.json nor .tar files")
    return tars


@contextmanager
def unpacked(tars: Sequence[Path], beside: Path) -> Iterator[list[Path]]:
    """Give plain tars in place of gzipped ones, which can't be read by offset: in a temporary folder on the disk of `beside`.

    Raises ShardError naming a damaged one.
    """
    if not any(tar.name.endswith(GZIPPED) for tar in tars):
        yield list(tars)
        return
    beside.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{beside.name}.unpacked-", dir=beside.parent) as folder:
        numbered = enumerate(tars)
        yield [_unpacked(tar, Path(folder, f"{n}-{tar.name}")) if tar.name.endswith(GZIPPED) else tar for n, tar in numbered]


def _unpacked(tar: Path, plain: Path) -> Path:
    try:
        with gzip.open(tar) as packed, open(plain, "xb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ShardError(f"{tar}: not a complete gzip file ({error}); copy or make it again") from None
    return plain


def scan(tar: Path) -> list[ForeignSample]:
    """List the samples of one tar file in the order of their first members, from its headers alone.

    A member is called KEY.PART; directories before the name are ignored. Captions (KEY.txt) and another tool's KEY.json, the only
    data that is read, are left out. Raises ShardError naming tar and member for a member with another kind of name, one that is
    not a regular file, two members of one name, and a truncated or damaged tar.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    end = 0
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                # A damaged header may hold a negative size, with which tarfile loops for ever.
                if member.size < 0 or member.offset < end:
                    raise ShardError(f"{tar}: damaged header at byte {member.offset}; copy or make it again")
                end = member.offset_data
                if not member.isdir():
                    key, extension = _name(member, tar)
                    part = part_of(extension)
                    parts = found.setdefault(key, {})
                    if part in parts:
                        raise ShardError(f"{tar}: two members are called {key}.{part}; keep one, or rename one")
                    parts[part] = member.offset_data, member.size
                    end += math.ceil(member.size / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    except ShardError:
        raise
    except Exception as error:  # tarfile raises nearly anything on damaged headers
        raise ShardError(f"{tar}: not a complete tar file ({error}); copy or make it again") from None
    _check_end(tar, end)
    with open(tar, "rb") as stream:
        return [_sample(tar, key, parts, stream) for key, parts in found.items()]


def _sample(tar: Path, key: str, parts: dict[str, tuple[int, int]], stream: BinaryIO) -> ForeignSample:
    left_out = ["txt"] if "txt" in parts else []
    if "json" in parts and not is_ours(_read(stream, *parts["json"])):
        left_out.append("json")
    return ForeignSample(tar, key, tuple((part, *parts[part]) for part in parts if part not in left_out), tuple(left_out))


def _name(member: tarfile.TarInfo, tar: Path) -> tuple[str, str]:
    """Return the key and the extension of a member."""
    key, _, extension = member.name.rpartition("/")[2].partition(".")
    if not key or not extension or not member.name.isprintable():
        hint = "leave it out, on macOS with COPYFILE_DISABLE=1"
        raise ShardError(f"{tar}: member {member.name!r:.100} is not called KEY.PART as in image_7.jpg; {hint}")
    if not member.isreg() or member.issparse():
        raise ShardError(f"{tar}: member {member.name!r:.100} is not a regular file; replace links and sparse files")
    return key, extension


def _check_end(tar: Path, end: int) -> None:
    """Raise ShardError unless only zeros, enough for an end marker, follow byte `end`: tarfile takes damage for the end."""
    with open(tar, "rb") as stream:
        stream.seek(end)
        rest = stream.read(2 * tarfile.BLOCKSIZE)
        if len(rest) < 2 * tarfile.BLOCKSIZE:
            raise ShardError(f"{tar}: has no end marker, so it is truncated; copy or make it again")
        while rest:
            if rest.strip(b"\0"):
                raise ShardError(f"{tar}: damaged after byte {end}, or another tar follows; copy it again, or join by tar -A")
            rest = stream.read(1 << 20)


def _read(stream: BinaryIO, offset: int, size: int) -> bytes:
    stream.seek(offset)
    return stream.read(size)


def load_foreign(sample: ForeignSample, num_classes: int, cls: str | None = None) -> PackedSample:
    """Read a sample's members unchanged from the tar. One without our json gets one (foreign_parts.with_json).

    Raises ShardError or OSError naming the tar.
    """
    with open(sample.tar, "rb") as stream:
        parts = {part: _read(stream, offset, size) for part, offset, size in sample.members}
    if any(len(parts[part]) < size for part, _, size in sample.members):
        raise ShardError(f"{sample.tar}: {sample.key}: the file was truncated while it was read")
    if "json" in parts:
        return PackedSample(sample.key, parts, str(sample.tar))
    try:
        made = with_json(parts, sample.key, sample.tar.name, num_classes, cls)
    except ShardError as error:
        raise ShardError(f"{sample.tar}: {error}") from None
    return PackedSample(key_of(sample.key), made, str(sample.tar))  # the json that was made holds the name
