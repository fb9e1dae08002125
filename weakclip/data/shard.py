"""The format of a shard set: tar files of samples beside one index.json (docs/data_format.md).

Shapes: H W image pixels, h w cells of an activation map, n maps of one sample; K classes of the set, 0 is background.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from weakclip.config import ConfigError, DataConfig
from weakclip.data.cache import File
from weakclip.data.decoders import decode_jpeg, decode_mask_png
from weakclip.data.storage import LocalStorage, RemoteStorage, Storage, StorageError
from weakclip.files import write_whole
from weakclip.labels import IGNORE

FORMAT = 1
INDEX = "index.json"
_PARTS = {"jpg", "png", "json", "cam.npz", "seed.png", "mask.png"}
# A key becomes a member's name: up to the first dot, within the 100 bytes of a plain tar header.
_KEY = re.compile(r"(?:(?![./\\])[ -~]){1,80}")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}\.tar")
_REPAIR = "run shards/verify.py on the set, then copy or build it again"

T = TypeVar("T")


class ShardError(ValueError):
    """A shard set, or something meant for one, is not what it should be. One line: the shard, the key, the cure."""


def _field(mapping: Any, name: str, kind: type[T], where: str) -> T:
    """`mapping[name]`, which must be a `kind`; JSON's true is not an int here. Raises ShardError naming `where`."""
    value = mapping.get(name) if isinstance(mapping, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ShardError(f"{where}: {name!r} is missing or not of type {kind.__name__}")
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# ---------------------------------------------------------------------------------------------------------- the index


@dataclass(frozen=True)
class Entry:
    """Where one sample lies: `length` bytes from byte `offset` of the file `shard` are its tar members."""

    shard: str
    key: str
    offset: int
    length: int


@dataclass(frozen=True)
class Shard(File):
    """One tar file and its samples in order."""

    samples: tuple[Entry, ...]

    def as_dict(self) -> dict[str, Any]:
        """As it stands in index.json."""
        rows = [[entry.key, entry.offset, entry.length] for entry in self.samples]
        return {"name": self.name, "bytes": self.bytes, "sha256": self.sha256, "samples": rows}


@dataclass(frozen=True)
class Index:
    """A shard set: where it lies, the class names by class index, and the shards."""

    storage: Storage
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]

    @classmethod
    def load(cls, path: str | Path, options: DataConfig | None = None) -> Index:
        """Read and check the index at `path`: a shard set's directory or URL, or that of its index.json.

        options: how to read from a URL. Raises ShardError when it is not an index of this format, when a key stands in it
        twice, when a sample lies outside its shard, or when a shard file of a directory is missing or not of the size the
        index gives; StorageError when a URL cannot be read; ConfigError when the cache is too small for the shuffle window.
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
            raise ShardError(f"{file}: cannot be read ({error}); {_REPAIR}") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ShardError(f"{file}: not a shard index of format {FORMAT}; build the set again with this version")
        classes = _field(raw, "classes", list, file)
        if not all(isinstance(c, str) for c in classes) or not 2 <= len(set(classes)) == len(classes) <= IGNORE:
            raise ShardError(f"{file}: 'classes' must be 2 to {IGNORE} different names")
        shards = tuple(parse_shard(item, file) for item in _field(raw, "shards", list, file))
        index = cls(storage, tuple(classes), shards)
        index._check()
        if isinstance(storage, RemoteStorage):
            _check_cache(shards, options or DataConfig())
        return index

    def _check(self) -> None:
        for what, names in (("shard", [s.name for s in self.shards]), ("key", [e.key for e in self.entries])):
            if len(set(names)) < len(names):
                twice = next(name for name, count in Counter(names).items() if count > 1)
                raise ShardError(f"{self.storage}/{INDEX}: {what} {twice!r} stands in it twice; keys must differ in a set")
        for shard in self.shards if isinstance(self.storage, LocalStorage) else ():
            file = self.root / shard.name
            size = file.stat().st_size if file.is_file() else None
            if size != shard.bytes:
                state = "missing" if size is None else f"{size} bytes long, not {shard.bytes}"
                raise ShardError(f"{file}: shard is {state}; copy it again, or build the set again")

    def save(self) -> None:
        """Write index.json into `root`."""
        raw = {"format": FORMAT, "classes": self.classes, "shards": [shard.as_dict() for shard in self.shards]}
        text = json.dumps(raw, separators=(",", ":"))
        write_whole(self.root / INDEX, text + "\n")

    @property
    def root(self) -> Path:
        """The set's directory. Raises ShardError where it lies at a URL."""
        if not isinstance(self.storage, LocalStorage):
            raise ShardError(f"{self.storage}: this needs a shard set on a local disk; copy it there")
        return self.storage.root

    @cached_property
    def _shard_of(self) -> dict[str, Shard]:
        return {shard.name: shard for shard in self.shards}

    @property
    def fingerprint(self) -> str:
        """SHA-256 that tells this set from one with other shards, in another order or of another size."""
        return hashlib.sha256(json.dumps([(s.name, s.sha256, len(s.samples)) for s in self.shards]).encode()).hexdigest()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All samples of all shards, in order."""
        return tuple(entry for shard in self.shards for entry in shard.samples)


def _check_cache(shards: Sequence[Shard], options: DataConfig) -> None:
    window = sum(sorted(shard.bytes for shard in shards)[-options.shuffle_window :])
    if options.cache and window > options.cache_gib * 2**30:
        what = f"the {options.shuffle_window} largest shards are {window / 2**30:.3g} GiB and would be fetched again and again"
        raise ConfigError(f"data.cache_gib={options.cache_gib:g}: {what}; raise it, or lower data.shuffle_window")


def parse_shard(raw: Any, file: str) -> Shard:
    """A shard as it stands in index.json, or in the index of a set in the making, `file`. Raises ShardError."""
    name = _field(raw, "name", str, file)
    where = f"{file}: shard {name!r}"
    size, sha256 = _field(raw, "bytes", int, where), _field(raw, "sha256", str, where)
    if not _SHARD_NAME.fullmatch(name) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise ShardError(f"{where}: not a shard's name, or not a SHA-256; {_REPAIR}")
    entries, end = [], 0
    for row in _field(raw, "samples", list, where):
        if not (isinstance(row, list) and len(row) == 3 and isinstance(row[0], str) and _KEY.fullmatch(row[0])):
            raise ShardError(f"{where}: {row!r:.80} is not [key, offset, length]; {_REPAIR}")
        key, offset, length = row
        if not (_is_count(offset) and _is_count(length) and end <= offset < offset + length <= size):
            raise ShardError(f"{where}: {key}: bytes {offset!r:.20} + {length!r:.20} do not fit its {size}; {_REPAIR}")
        entries.append(Entry(name, key, offset, length))
        end = offset + length
    return Shard(name, size, sha256, tuple(entries))


# --------------------------------------------------------------------------------------------------------- one sample


@dataclass(frozen=True, eq=False)
class Cam:
    """Class activation maps of one image.

    classes: class index of each map. maps_nhw: uint8, 255 = 1.0. scale: side of a map / side of the image, >= 1/4.
    """

    classes: tuple[int, ...]
    maps_nhw: np.ndarray
    scale: float

    def encode(self) -> bytes:
        """The maps as a compressed .npz; equal maps give equal bytes."""
        classes_n, scale = np.array(self.classes, np.int32), np.array(self.scale, np.float32)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, array in (("classes", classes_n), ("cam", self.maps_nhw), ("scale", scale)):
                member = io.BytesIO()
                np.save(member, array, allow_pickle=False)
                # A ZipInfo of our own has a fixed date, which np.savez does not promise.
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_DEFLATED)
        return buffer.getvalue()

    @staticmethod
    def decode(data: bytes) -> Cam:
        """Read what `encode` wrote. Raises ShardError for anything else; pickles are never loaded."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                # Members are read whole, because only then does zipfile compare their CRC.
                members = [archive.read(f"{name}.npy") for name in ("classes", "cam", "scale")]
            classes_n, maps_nhw, scale = (np.load(io.BytesIO(member), allow_pickle=False) for member in members)
        except Exception as error:  # a reader of damaged bytes may raise anything
            raise ShardError(f"cam.npz cannot be read ({error})") from None
        if (classes_n.dtype, maps_nhw.dtype, scale.dtype) != (np.int32, np.uint8, np.float32):
            raise ShardError("cam.npz must hold classes int32, cam uint8 and scale float32")
        if classes_n.ndim != 1 or maps_nhw.ndim != 3 or scale.ndim != 0 or len(classes_n) != len(maps_nhw):
            raise ShardError(f"cam.npz holds {classes_n.shape} classes for maps of shape {maps_nhw.shape}")
        return Cam(tuple(classes_n.tolist()), maps_nhw, scale.item())

    def fits(self, height: int, width: int) -> bool:
        """Whether the maps can be of an H x W image: its proportions, to one cell, and 1/4 of its sides or more."""
        h, w = self.maps_nhw.shape[1:]
        lows = (h - 1) / height, (w - 1) / width
        highs = (h + 1) / height, (w + 1) / width
        proportional = max(lows) <= min(highs) and min(lows) <= self.scale <= max(highs)
        return proportional and 4 * h >= height and 4 * w >= width


@dataclass
class Sample:
    """What a shard holds for one image. `image` is its file's bytes, untouched; `seed` and `mask` are 8-bit PNGs."""

    key: str
    image: bytes
    image_ext: str  # "jpg" or "png"
    classes: tuple[int, ...]
    height: int
    width: int
    source: str
    cam: Cam | None = None
    seed: bytes | None = None
    mask: bytes | None = None

    def encode(self) -> dict[str, bytes]:
        """The sample's members: extension -> bytes."""
        about: dict[str, Any] = {"id": self.key, "height": self.height, "width": self.width}
        about |= {"classes": self.classes, "source": self.source}
        parts = {
            self.image_ext: self.image,
            "json": json.dumps(about).encode(),
            "cam.npz": self.cam.encode() if self.cam else None,
            "seed.png": self.seed,
            "mask.png": self.mask,
        }
        return {ext: data for ext, data in parts.items() if data is not None}


@dataclass(frozen=True)
class PackedSample:
    """A sample whose members are written as they are: extension -> bytes. source: where they come from, for messages."""

    key: str
    parts: dict[str, bytes]
    source: str

    def encode(self) -> dict[str, bytes]:
        """The sample's members: extension -> bytes."""
        return self.parts


@dataclass(frozen=True, eq=False)
class DecodedSample:
    """A sample as arrays, checked.

    image: uint8 H x W x 3, RGB. classes: indices 1..K-1 of the classes present, ascending. cam: its maps or None.
    seed, mask: uint8 H x W with values 0..K-1 and 255 (ignored), or None.
    """

    key: str
    image: np.ndarray
    classes: tuple[int, ...]
    cam: Cam | None
    seed: np.ndarray | None
    mask: np.ndarray | None

    @property
    def size(self) -> tuple[int, int]:
        """H, W of the image."""
        return self.image.shape[0], self.image.shape[1]


@dataclass(frozen=True, eq=False)
class OpenSample:
    """A sample as training begins with it: as a DecodedSample, but the picture is still to be decoded.

    size: H, W of the picture. cam: None as well where there is a seed.
    """

    entry: Entry
    size: tuple[int, int]
    classes: tuple[int, ...]
    cam: Cam | None
    seed: np.ndarray | None
    parts: dict[str, bytes]

    @property
    def key(self) -> str:
        return self.entry.key

    def decode_picture(self, least: tuple[int, int]) -> np.ndarray:
        """The picture, uint8 H x W x 3, or what a JPEG's decoder makes of it at 1/2, 3/8, 1/4 or 1/8 of its size.

        The latter where that is still H, W = `least` or more. Raises ShardError when it is damaged.
        """
        with _naming(self.entry):
            return _decode_picture(self.parts, self.size, least)


def decode_sample(parts: dict[str, bytes], entry: Entry, num_classes: int) -> DecodedSample:
    """Decode and check one sample; `parts` is what `read_entry` returns, `num_classes` is K.

    Raises ShardError naming shard and key when a part is damaged, missing or unknown, or when the parts do not fit each
    other: another size than the image's, a class outside 1..K-1, a CAM of a class the image is not labelled with.
    """
    with _naming(entry):
        return _decode(parts, entry.key, num_classes)


def open_sample(parts: dict[str, bytes], entry: Entry, num_classes: int) -> OpenSample:
    """What training needs of a sample; the mask is not looked at, nor the CAM where there is a seed.

    Raises ShardError as `decode_sample` does; for damage of the picture only when that is decoded.
    """
    with _naming(entry):
        size_HW, classes = _decode_about(parts, entry.key, num_classes)
        seed_HW = decode_mask(parts.get("seed.png"), "seed.png", size_HW, num_classes)
        cam = _decode_cam(parts, size_HW, classes) if seed_HW is None else None
        return OpenSample(entry, size_HW, classes, cam, seed_HW, parts)


@contextmanager
def _naming(entry: Entry) -> Iterator[None]:
    try:
        yield
    except ShardError as error:
        raise ShardError(f"{entry.shard}: {entry.key}: {error}; {_REPAIR}") from None


def check_parts(parts: dict[str, bytes], key: str, num_classes: int) -> None:
    """Raise ShardError when these are not the parts of a sample, as `decode_sample` does, or its key cannot be a tar member's."""
    if not _KEY.fullmatch(key):
        raise ShardError("a key is 1 to 80 printable ASCII characters other than . / \\; rename the image")
    _decode(parts, key, num_classes)


def _decode(parts: dict[str, bytes], key: str, num_classes: int) -> DecodedSample:
    size_HW, classes = _decode_about(parts, key, num_classes)
    image_HW3, cam = _decode_picture(parts, size_HW), _decode_cam(parts, size_HW, classes)
    masks = [decode_mask(parts.get(name), name, size_HW, num_classes) for name in ("seed.png", "mask.png")]
    return DecodedSample(key, image_HW3, classes, cam, *masks)


def _decode_about(parts: dict[str, bytes], key: str, num_classes: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Image size (H, W) and classes present from a sample's KEY.json, once its parts are those of a sample."""
    if unknown := parts.keys() - _PARTS:
        raise ShardError(f"unknown part {min(unknown)!r}")
    if len(parts.keys() & {"jpg", "png"}) != 1 or "json" not in parts:
        raise ShardError(f"needs one image and one json, has {', '.join(sorted(parts)) or 'nothing'}")
    try:
        about = json.loads(parts["json"])
    except (ValueError, RecursionError) as error:
        raise ShardError(f"its json cannot be read ({error})") from None
    if _field(about, "id", str, "its json") != key:
        raise ShardError(f"its json is that of {about['id']!r}")
    _field(about, "source", str, "its json")
    classes = _field(about, "classes", list, "its json")
    if not all(_is_count(c) and 1 <= c < num_classes for c in classes) or classes != sorted(set(classes)):
        raise ShardError(f"classes {classes!r:.80} are not ascending indices within 1..{num_classes - 1}")
    return (_field(about, "height", int, "its json"), _field(about, "width", int, "its json")), tuple(classes)


def _decode_cam(parts: dict[str, bytes], size_HW: tuple[int, int], classes: Sequence[int]) -> Cam | None:
    cam = Cam.decode(parts["cam.npz"]) if "cam.npz" in parts else None
    if cam and (strangers := set(cam.classes) - set(classes)):
        raise ShardError(f"CAM of class {min(strangers)}, which the image's labels {list(classes)} do not hold")
    if cam and not cam.fits(*size_HW):
        raise ShardError(f"CAM of {cam.maps_nhw.shape[1:]} at scale {cam.scale:.3f} does not fit an image of {size_HW}")
    return cam


def _decode_picture(parts: dict[str, bytes], size_HW: tuple[int, int], least_HW: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 H x W x 3; of a JPEG perhaps less, as OpenSample.decode_picture says."""
    (extension,) = parts.keys() & {"jpg", "png"}
    if extension == "jpg" and (image_HW3 := decode_jpeg(parts["jpg"], size_HW, least_HW or size_HW)) is not None:
        return image_HW3
    with _open_image(parts[extension], extension, size_HW) as image:
        return _to_rgb(image)


def _open_image(data: bytes, what: str, size_HW: tuple[int, int]) -> Image.Image:
    """The loaded picture; `what` is its extension, for the message and the decoder. It must be of size (H, W)."""
    try:
        image = Image.open(io.BytesIO(data), formats=["JPEG" if what == "jpg" else "PNG"])
        if image.size == size_HW[::-1]:  # looked at first: a damaged header may claim gigabytes
            image.load()
            return image
    except Exception as error:  # a decoder of damaged bytes may raise anything
        raise ShardError(f"{what} does not decode ({error})") from None
    raise ShardError(f"{what} is {image.height} x {image.width}, not {size_HW[0]} x {size_HW[1]} as its json says")


def _to_rgb(image: Image.Image) -> np.ndarray:
    """uint8 H x W x 3. EXIF rotation is left alone: CAMs and masks follow the stored pixels."""
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))


def decode_mask(data: bytes | None, what: str, size_HW: tuple[int, int], num_classes: int) -> np.ndarray | None:
    """uint8 H x W of class indices and 255; None for a part the sample has not.

    Raises ShardError naming the part `what` when it is no 8-bit PNG of this size, or holds a class outside 0..K-1.
    """
    if data is None:
        return None
    mask_HW = decode_mask_png(data, size_HW)
    if mask_HW is None:
        mask_HW = _decode_any_mask(data, what, size_HW)
    if mask_HW.max() >= num_classes and (mask_HW + np.uint8(1)).max() > num_classes:  # IGNORE, 255, becomes 0
        wrong = mask_HW[(mask_HW >= num_classes) & (mask_HW != IGNORE)][0]
        raise ShardError(f"{what} holds {wrong}, which is neither 0..{num_classes - 1} nor {IGNORE}")
    return mask_HW


def _decode_any_mask(data: bytes, what: str, size_HW: tuple[int, int]) -> np.ndarray:
    with _open_image(data, what, size_HW) as image:
        # Pillow stretches grey of fewer bits to 0..255, so the depth (byte 24 of a PNG) must be 8 to hold indices.
        if image.mode != "P" and (image.mode != "L" or data[24] != 8):
            raise ShardError(f"{what} must be 8-bit grey or palette, is {image.mode}; save class indices, not colours")
        return np.array(image)


# ------------------------------------------------------------------------------------------------------------ reading


def read_entry(index: Index, entry: Entry) -> dict[str, bytes]:
    """The sample's members (extension -> bytes), by one seek and one read.

    Raises ShardError as `parse_group` does, StorageError when a URL cannot be read.
    """
    try:
        data = index.storage.read_range(index._shard_of[entry.shard], entry.offset, entry.length)
    except OSError as error:
        where = f"{index.storage}/{entry.shard}: {entry.key}"
        raise ShardError(f"{where}: cannot be read ({error.strerror}); {_REPAIR}") from None
    return parse_group(data, entry)


def parse_group(data: bytes, entry: Entry) -> dict[str, bytes]:
    """The members (extension -> bytes) in one sample's byte range of a shard.

    Raises ShardError when the range is short, is not whole tar members, or holds members of another key.
    """
    where = f"{entry.shard}: {entry.key}"
    if len(data) != entry.length:
        raise ShardError(f"{where}: {len(data)} bytes where the index has {entry.length}; {_REPAIR}")
    parts: dict[str, bytes] = {}
    end = 0
    while end < len(data):
        start = end + tarfile.BLOCKSIZE
        try:
            name, size = _tar_member(data[end:start])
        except tarfile.TarError as error:
            raise ShardError(f"{where}: not tar members ({error}); {_REPAIR}") from None
        key, _, extension = name.partition(".")
        if key != entry.key or extension in parts or size < 0:
            raise ShardError(f"{where}: unexpected member {name!r:.100}; {_REPAIR}")
        parts[extension] = data[start : start + size]
        end = start + math.ceil(size / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if end != len(data):
        raise ShardError(f"{where}: tar members end at byte {end} of {len(data)}; {_REPAIR}")
    return parts


_PLAIN_HEADER = struct.Struct("100s 24x 12s 12x 8s c 188x 155s 12x")  # name, size, checksum, kind, prefix of the name


def _tar_member(header: bytes) -> tuple[str, int]:
    """Name and size of the member that a tar header begins; -1 for what is no file. Raises TarError where it is none.

    tarfile reads a header in sixty microseconds, and a sample has three: those that shards are made of are read here.
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


def sha256(file: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
