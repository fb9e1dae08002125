"""Reading one sample of a shard set with one seek and one read."""

from __future__ import annotations

import math
import struct
import tarfile
from collections.abc import Callable
from typing import TypeVar

from weakclip.data.index import REPAIR, Entry, Index, ShardError
from weakclip.data.sample import DecodedSample, decode_sample

T = TypeVar("T")


def load(index: Index, entry: Entry) -> DecodedSample:
    """Return one decoded sample. Raises ShardError when it is damaged, StorageError when a URL cannot be read."""
    return read_and_decode(index, entry, lambda parts: decode_sample(parts, entry, len(index.classes)))


def read_and_decode(index: Index, entry: Entry, decode: Callable[[dict[str, bytes]], T]) -> T:
    """Return `decode` of the sample's members. From an unchecked source, a damaged sample is read once more."""
    try:
        return decode(read_entry(index, entry))
    except ShardError:
        if index.storage.checked:
            raise
    return decode(read_entry(index, entry))  # the network may have changed it


def read_entry(index: Index, entry: Entry) -> dict[str, bytes]:
    """Return the sample's members (extension -> bytes), with one seek and one read.

    Raises ShardError as `parse_group` does, StorageError when a URL cannot be read.
    """
    try:
        data = index.storage.read_range(index.shard_of[entry.shard], entry.offset, entry.length)
    except OSError as error:
        where = f"{index.storage}/{entry.shard}: {entry.key}"
        raise ShardError(f"{where}: cannot be read ({error.strerror}); {REPAIR}") from None
    return parse_group(data, entry)


def parse_group(data: bytes, entry: Entry) -> dict[str, bytes]:
    """Return the members (extension -> bytes) in one sample's byte range of a shard.

    Raises ShardError when the range is short, is not whole tar members, or holds members of another key.
    """
    where = f"{entry.shard}: {entry.key}"
    if len(data) != entry.length:
        raise ShardError(f"{where}: {len(data)} bytes, but the index has {entry.length}; {REPAIR}")
    parts: dict[str, bytes] = {}
    end = 0
    while end < len(data):
        start = end + tarfile.BLOCKSIZE
        try:
            name, size = _tar_member(data[end:start])
        except tarfile.TarError as error:
            raise ShardError(f"{where}: not tar members ({error}); {REPAIR}") from None
        key, _, extension = name.partition(".")
        if key != entry.key or extension in parts or size < 0:
            raise ShardError(f"{where}: unexpected member {name!r:.100}; {REPAIR}")
        parts[extension] = data[start : start + size]
        end = start + math.ceil(size / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if end != len(data):
        raise ShardError(f"{where}: tar members end at byte {end} of {len(data)}; {REPAIR}")
    return parts


_PLAIN_HEADER = struct.Struct("100s 24x 12s 12x 8s c 188x 155s 12x")  # name, size, checksum, kind, prefix of the name


def _tar_member(header: bytes) -> tuple[str, int]:
    """Return name and size of the member whose tar header this is; the size is -1 if it is not a file. Raises TarError.

    tarfile needs sixty microseconds per header, and a sample has three; so the plain headers that shards use are read here.
    """
    try:
        name, size, checksum, kind, prefix = _PLAIN_HEADER.unpack(header)
        plain = kind == tarfile.REGTYPE and not any(prefix)
        if plain and int(checksum.partition(b"\0")[0], 8) == sum(header) - sum(checksum) + 8 * ord(" "):
            return name.partition(b"\0")[0].decode("ascii"), int(size.partition(b"\0")[0], 8)
    except (struct.error, ValueError):
        pass
    member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    return member.name, member.size if member.isreg() else -1
