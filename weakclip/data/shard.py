"""The format of a shard set: tar files of samples beside one index.json (docs/data_format.md).

Shapes: H W image pixels, h w cells of an activation map, n maps of one sample; K classes of the set, 0 is background.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

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
R = TypeVar("R")


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
class Shard:
    """One tar file: its name in the set's directory, its size in bytes, its SHA-256, its samples in order."""

    name: str
    bytes: int
    sha256: str
    samples: tuple[Entry, ...]


@dataclass(frozen=True)
class Index:
    """A shard set: the directory, the class names by class index, and the shards."""

    root: Path
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]

    @classmethod
    def load(cls, path: str | Path) -> Index:
        """Read and check the index at `path`, a shard set's directory or its index.json.

        Raises ShardError when it is not an index of this format, when a key stands in it twice, when a sample lies
        outside its shard, or when a shard file is missing or not of the size the index gives.
        """
        path = Path(path)
        file = path if path.name == INDEX else path / INDEX
        try:
            raw = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise ShardError(f"{file}: no such file; `python shards/build.py` makes a shard set") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ShardError(f"{file}: cannot be read ({error}); {_REPAIR}") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ShardError(f"{file}: not a shard index of format {FORMAT}; build the set again with this version")
        classes = _field(raw, "classes", list, str(file))
        if not all(isinstance(c, str) for c in classes) or not 2 <= len(set(classes)) == len(classes) <= IGNORE:
            raise ShardError(f"{file}: 'classes' must be 2 to {IGNORE} different names")
        shards = tuple(_parse_shard(item, file) for item in _field(raw, "shards", list, str(file)))
        index = cls(file.parent, tuple(classes), shards)
        index._check()
        return index

    def _check(self) -> None:
        for what, names in (("shard", [s.name for s in self.shards]), ("key", [e.key for e in self.entries])):
            if len(set(names)) < len(names):
                twice = next(name for name, count in Counter(names).items() if count > 1)
                raise ShardError(f"{self.root / INDEX}: {what} {twice!r} stands in it twice; keys must differ in a set")
        for shard in self.shards:
            file = self.root / shard.name
            size = file.stat().st_size if file.is_file() else None
            if size != shard.bytes:
                state = "missing" if size is None else f"{size} bytes long, not {shard.bytes}"
                raise ShardError(f"{file}: shard is {state}; copy it again, or build the set again")

    def save(self) -> None:
        """Write index.json into `root`."""
        shards = []
        for shard in self.shards:
            rows = [[entry.key, entry.offset, entry.length] for entry in shard.samples]
            shards.append({"name": shard.name, "bytes": shard.bytes, "sha256": shard.sha256, "samples": rows})
        text = json.dumps({"format": FORMAT, "classes": self.classes, "shards": shards}, separators=(",", ":"))
        write_whole(self.root / INDEX, text + "\n")

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All samples of all shards, in order."""
        return tuple(entry for shard in self.shards for entry in shard.samples)


def _parse_shard(raw: Any, file: Path) -> Shard:
    name = _field(raw, "name", str, str(file))
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


def decode_sample(parts: dict[str, bytes], entry: Entry, num_classes: int) -> DecodedSample:
    """Decode and check one sample; `parts` is what `read_entry` returns, `num_classes` is K.

    Raises ShardError naming shard and key when a part is damaged, missing or unknown, or when the parts do not fit each
    other: another size than the image's, a class outside 1..K-1, a CAM of a class the image is not labelled with.
    """
    try:
        return _decode(parts, entry.key, num_classes)
    except ShardError as error:
        raise ShardError(f"{entry.shard}: {entry.key}: {error}; {_REPAIR}") from None


def _decode(parts: dict[str, bytes], key: str, num_classes: int) -> DecodedSample:
    if unknown := parts.keys() - _PARTS:
        raise ShardError(f"unknown part {min(unknown)!r}")
    if len(extensions := parts.keys() & {"jpg", "png"}) != 1 or "json" not in parts:
        raise ShardError(f"needs one image and one json, has {', '.join(sorted(parts)) or 'nothing'}")
    size_HW, classes = _decode_about(parts["json"], key, num_classes)
    (extension,) = extensions
    with _open_image(parts[extension], extension, size_HW) as image:
        image_HW3 = _to_rgb(image)
    cam = Cam.decode(parts["cam.npz"]) if "cam.npz" in parts else None
    if cam and (strangers := set(cam.classes) - set(classes)):
        raise ShardError(f"CAM of class {min(strangers)}, which the image's labels {list(classes)} do not hold")
    if cam and not cam.fits(*size_HW):
        raise ShardError(f"CAM of {cam.maps_nhw.shape[1:]} at scale {cam.scale:.3f} does not fit an image of {size_HW}")
    masks = [_decode_mask(parts.get(name), name, size_HW, num_classes) for name in ("seed.png", "mask.png")]
    return DecodedSample(key, image_HW3, classes, cam, *masks)


def _decode_about(data: bytes, key: str, num_classes: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Image size (H, W) and classes present from a sample's KEY.json."""
    try:
        about = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"its json cannot be read ({error})") from None
    if _field(about, "id", str, "its json") != key:
        raise ShardError(f"its json is that of {about['id']!r}")
    _field(about, "source", str, "its json")
    classes = _field(about, "classes", list, "its json")
    if not all(_is_count(c) and 1 <= c < num_classes for c in classes) or classes != sorted(set(classes)):
        raise ShardError(f"classes {classes!r:.80} are not ascending indices within 1..{num_classes - 1}")
    return (_field(about, "height", int, "its json"), _field(about, "width", int, "its json")), tuple(classes)


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


def _decode_mask(data: bytes | None, what: str, size_HW: tuple[int, int], num_classes: int) -> np.ndarray | None:
    """uint8 H x W of class indices and 255; None for a part the sample has not."""
    if data is None:
        return None
    with _open_image(data, what, size_HW) as image:
        # Pillow stretches grey of fewer bits to 0..255, so the depth (byte 24 of a PNG) must be 8 to hold indices.
        if image.mode != "P" and (image.mode != "L" or data[24] != 8):
            raise ShardError(f"{what} must be 8-bit grey or palette, is {image.mode}; save class indices, not colours")
        mask_HW = np.array(image)
    wrong_HW = (mask_HW >= num_classes) & (mask_HW != IGNORE)
    if wrong_HW.any():
        raise ShardError(f"{what} holds {mask_HW[wrong_HW][0]}, which is neither 0..{num_classes - 1} nor {IGNORE}")
    return mask_HW


# ------------------------------------------------------------------------------------------------------------ reading


def read_entry(root: Path, entry: Entry) -> dict[str, bytes]:
    """The sample's members (extension -> bytes), by one seek and one read. Raises ShardError as `parse_group` does."""
    try:
        with open(root / entry.shard, "rb", buffering=0) as file:
            file.seek(entry.offset)
            data = file.read(entry.length)
    except OSError as error:
        raise ShardError(f"{root / entry.shard}: {entry.key}: cannot be read ({error.strerror}); {_REPAIR}") from None
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
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                if key != entry.key or extension in parts or not member.isreg():
                    raise ShardError(f"{where}: unexpected member {member.name!r:.100}; {_REPAIR}")
                parts[extension] = data[member.offset_data : member.offset_data + member.size]
                end = member.offset_data + math.ceil(member.size / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    except (tarfile.TarError, OSError, EOFError, OverflowError) as error:
        raise ShardError(f"{where}: not tar members ({error}); {_REPAIR}") from None
    if end != len(data):  # tarfile takes a damaged header for the end
        raise ShardError(f"{where}: tar members end at byte {end} of {len(data)}; {_REPAIR}")
    return parts


def sha256(file: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------ writing


def build_shards(
    items: Sequence[T],
    load: Callable[[T], Sample],
    out: str | Path,
    classes: Sequence[str],
    samples_per_shard: int = 256,
    processes: int = 1,
) -> Index:
    """Write `load(item)` of every item into a new shard set at `out`; each process writes whole shards.

    The bytes depend on the samples and `samples_per_shard`, not on `processes`. With more than one process `items` and
    `load` must pickle. It is built in the directory OUT.partial, which is renamed at the end: `out` is whole or absent.

    Raises ShardError naming the key when a sample fails a check, and when `out` or OUT.partial is in use already;
    whatever `load` raises passes through.
    """
    if samples_per_shard < 1 or processes < 1:
        raise ValueError("samples_per_shard and processes must be at least 1")
    if not items:
        raise ShardError(f"{out}: there are no images to write")
    out = Path(out).resolve()
    work = _claim(out)
    try:
        starts = range(0, len(items), samples_per_shard)
        paths = [work / f"shard-{number:05d}.tar" for number in range(len(starts))]
        chunks = [items[start : start + samples_per_shard] for start in starts]
        shards = []
        with tqdm(total=len(items), unit=" images", desc=out.name) as bar:
            for shard in map_in_processes(partial(_write_shard, load, len(classes)), processes, paths, chunks):
                shards.append(shard)
                bar.update(len(shard.samples))
        Index(work, tuple(classes), tuple(shards)).save()
        index = Index.load(work)
        work.rename(out)
    except BaseException:
        shutil.rmtree(work)
        raise
    return replace(index, root=out)


def _claim(out: Path) -> Path:
    """Make and return the directory OUT.partial. Nothing that was there before is touched."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ShardError(f"{out}: holds files already; remove it, or build into another directory")
    work = out.with_name(out.name + ".partial")
    try:
        work.mkdir(parents=True)
    except FileExistsError:
        message = "a build is running, or one was killed; if none is running remove this directory, then build again"
        raise ShardError(f"{work}: {message}") from None
    return work


def map_in_processes(function: Callable[..., R], processes: int, *arguments: Sequence[Any]) -> Iterator[R]:
    """`map(function, *arguments)` over up to `processes` processes, results in order; one means this process.

    Raises ShardError when a process dies; what `function` raises passes through.
    """
    processes = min(processes, len(arguments[0]))
    if processes <= 1:
        yield from map(function, *arguments)
        return
    # Spawned, not forked: a fork would copy the locks of whatever threads (torch's, say) the caller has.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(processes, context, _die_with_parent) as pool:
            yield from pool.map(function, *arguments)
    except BrokenProcessPool:
        raise ShardError("a process ended abruptly, perhaps for want of memory; use fewer processes") from None


def _die_with_parent() -> None:
    """Without this a killed build's processes would stay, and write into the directory of the next build."""

    def watch() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_shard(load: Callable[[T], Sample], num_classes: int, path: Path, items: Sequence[T]) -> Shard:
    from webdataset.writer import TarWriter  # imports torch, which those who only read shards need not load

    entries = []
    with open(path, "xb") as file, TarWriter(file, user="root", group="root", mtime=0, encoder=False) as tar:
        for item in items:
            sample = load(item)
            parts = sample.encode()
            try:
                if not _KEY.fullmatch(sample.key):
                    raise ShardError("a key is 1 to 80 printable ASCII characters other than . / \\; rename the image")
                _decode(parts, sample.key, num_classes)
            except ShardError as error:
                raise ShardError(f"{sample.source}: {sample.key}: {error}") from None
            start = tar.tarstream.offset
            tar.write({"__key__": sample.key, **parts})
            entries.append(Entry(path.name, sample.key, start, tar.tarstream.offset - start))
    return Shard(path.name, path.stat().st_size, sha256(path), tuple(entries))
