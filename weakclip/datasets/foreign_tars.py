"""Tar shards of any origin: members are grouped into samples by name, in any order and any tar dialect."""

from __future__ import annotations

import math
import tarfile
from dataclasses import dataclass
from pathlib import Path

from weakclip.data.index import ShardError
from weakclip.data.sample import PackedSample


@dataclass(frozen=True)
class ForeignSample:
    """One sample of a tar file. members: extension, offset and size in bytes of each part's data."""

    tar: Path
    key: str
    members: tuple[tuple[str, int, int], ...]


def tar_files(directory: Path) -> list[Path]:
    """List the tar files in a directory by name. Raises ShardError where there are none, or where one is compressed."""
    names = sorted(path for path in directory.iterdir() if path.is_file())
    if packed := next((path for path in names if path.suffix == ".tgz" or ".tar." in path.name), None):
        raise ShardError(f"{packed}: is compressed, so it cannot be read by offset; decompress it to a plain .tar first")
    if not (tars := [path for path in names if path.suffix == ".tar"]):
        raise ShardError(f"{directory}: holds neither an index.json nor .tar files")
    return tars


def scan(tar: Path) -> list[ForeignSample]:
    """List the samples of one tar file in the order of their first members, from its headers alone.

    A member is called KEY.PART; directories before the name are ignored. Raises ShardError naming tar and member for a member
    with another kind of name, one that is not a regular file, two members of one name, and a truncated or damaged tar.
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
                    parts = found.setdefault(key, {})
                    if extension in parts:
                        raise ShardError(f"{tar}: two members are called {key}.{extension}; keep one, or rename one")
                    parts[extension] = member.offset_data, member.size
                    end += math.ceil(member.size / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    except ShardError:
        raise
    except Exception as error:  # tarfile raises nearly anything on damaged headers
        raise ShardError(f"{tar}: not a complete tar file ({error}); copy or make it again") from None
    _check_end(tar, end)
    return [ForeignSample(tar, key, tuple((ext, *place) for ext, place in parts.items())) for key, parts in found.items()]


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


def load_foreign(sample: ForeignSample) -> PackedSample:
    """Read a sample's members unchanged from the tar. Raises ShardError or OSError naming the tar."""
    parts = {}
    with open(sample.tar, "rb") as stream:
        for extension, offset, size in sample.members:
            stream.seek(offset)
            parts[extension] = stream.read(size)
            if len(parts[extension]) < size:
                raise ShardError(f"{sample.tar}: {sample.key}: the file was truncated while it was read")
    return PackedSample(sample.key, parts, str(sample.tar))
