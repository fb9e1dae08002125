"""Tar shards of any origin: samples are put together by their members' names, in whatever order and tar dialect they come."""

from __future__ import annotations

import math
import tarfile
from dataclasses import dataclass
from pathlib import Path

from weakclip.data.index import ShardError
from weakclip.data.sample import PackedSample


@dataclass(frozen=True)
class ForeignSample:
    """One sample of a tar file; `members`: extension, first byte and number of bytes of each part's data."""

    tar: Path
    key: str
    members: tuple[tuple[str, int, int], ...]


def tar_files(directory: Path) -> list[Path]:
    """The tar files in a directory by name. Raises ShardError where there are none, or compressed ones."""
    names = sorted(path for path in directory.iterdir() if path.is_file())
    if packed := next((path for path in names if path.suffix == ".tgz" or ".tar." in path.name), None):
        raise ShardError(f"{packed}: is compressed, so nothing in it can be looked up; unpack it to a plain .tar first")
    if not (tars := [path for path in names if path.suffix == ".tar"]):
        raise ShardError(f"{directory}: holds neither an index.json nor .tar files")
    return tars


def scan(tar: Path) -> list[ForeignSample]:
    """The samples of one tar file in the order of their first members, by its headers alone.

    A member is called KEY.PART; directories before the name don't count. Raises ShardError naming tar and member for a member
    called otherwise or one that is no plain file, for two members of one name, and for a tar that is cut off or damaged.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {}
    end = 0
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                # A header may hold negative sizes, with which tarfile runs in circles.
                if member.size < 0 or member.offset < end:
                    raise ShardError(f"{tar}: a damaged header at byte {member.offset}; copy or make it again")
                end = member.offset_data
                if not member.isdir():
                    key, extension = _name(member, tar)
                    parts = found.setdefault(key, {})
                    if extension in parts:
                        raise ShardError(f"{tar}: two members are called {key}.{extension}; keep one, or give them other keys")
                    parts[extension] = member.offset_data, member.size
                    end += math.ceil(member.size / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    except ShardError:
        raise
    except Exception as error:  # tarfile raises nearly anything on damaged headers
        raise ShardError(f"{tar}: not a whole tar file ({error}); copy or make it again") from None
    _check_end(tar, end)
    return [ForeignSample(tar, key, tuple((ext, *place) for ext, place in parts.items())) for key, parts in found.items()]


def _name(member: tarfile.TarInfo, tar: Path) -> tuple[str, str]:
    """Key and extension of a member."""
    key, _, extension = member.name.rpartition("/")[2].partition(".")
    if not key or not extension or not member.name.isprintable():
        cure = "leave it out, on macOS with COPYFILE_DISABLE=1"
        raise ShardError(f"{tar}: member {member.name!r:.100} is not called KEY.PART as in image_7.jpg; {cure}")
    if not member.isreg() or member.issparse():
        raise ShardError(f"{tar}: member {member.name!r:.100} is a link, sparse or no file; pack plain files")
    return key, extension


def _check_end(tar: Path, end: int) -> None:
    """Raise ShardError unless zeros alone follow byte `end`, enough to mark the end: tarfile takes damage for the end."""
    with open(tar, "rb") as stream:
        stream.seek(end)
        rest = stream.read(2 * tarfile.BLOCKSIZE)
        if len(rest) < 2 * tarfile.BLOCKSIZE:
            raise ShardError(f"{tar}: ends without a tar's end mark, so it is cut off; copy or make it again")
        while rest:
            if rest.strip(b"\0"):
                raise ShardError(f"{tar}: damaged after byte {end}, or another tar follows; copy it again, or join by tar -A")
            rest = stream.read(1 << 20)


def load_foreign(sample: ForeignSample) -> PackedSample:
    """The sample's members as they lie in the tar. Raises ShardError or OSError naming the tar."""
    parts = {}
    with open(sample.tar, "rb") as stream:
        for extension, offset, size in sample.members:
            stream.seek(offset)
            parts[extension] = stream.read(size)
            if len(parts[extension]) < size:
                raise ShardError(f"{sample.tar}: {sample.key}: the file became shorter while it was read")
    return PackedSample(sample.key, parts, str(sample.tar))
