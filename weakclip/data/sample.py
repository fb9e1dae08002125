"""One sample of a shard: its parts as bytes and as checked arrays (docs/data_format.md).

Shapes: H W image pixels, h w cells of an activation map, n maps of one sample; K classes of the set, 0 is background.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from weakclip.data.codecs import decode_jpeg, decode_mask_png
from weakclip.data.index import KEY, REPAIR, Entry, ShardError, is_count, json_field
from weakclip.data.names import key_of, names_a_file
from weakclip.data.orientation import turn, turned_size
from weakclip.labels import IGNORE
from weakclip.runtime.errors import UserError

IMAGES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
"""Extension of a sample's image -> its format, as Pillow calls it."""


class UnreadableImageError(UserError):
    """A single image, not one of a shard set, is damaged or of another format. One line: the file, and what is wrong."""


_PARTS = {*IMAGES, "json", "cam.npz", "seed.png", "mask.png"}


@dataclass(frozen=True, eq=False)
class Cam:
    """Class activation maps of one image.

    classes: class index of each map. maps_nhw: uint8, where 255 is 1.0. scale: side of a map / side of the image, >= 1/4.
    """

    classes: tuple[int, ...]
    maps_nhw: np.ndarray
    scale: float

    def encode(self) -> bytes:
        """Return the maps as a compressed .npz; equal maps give equal bytes."""
        classes_n, scale = np.array(self.classes, np.int32), np.array(self.scale, np.float32)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, array in (("classes", classes_n), ("cam", self.maps_nhw), ("scale", scale)):
                member = io.BytesIO()
                np.save(member, array, allow_pickle=False)
                # A ZipInfo made here has a fixed date, which np.savez does not guarantee.
                archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_DEFLATED)
        return buffer.getvalue()

    @staticmethod
    def decode(data: bytes) -> Cam:
        """Read what `encode` wrote. Raises ShardError for anything else; pickles are never loaded."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                # Members are read completely, because only then does zipfile check their CRC.
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
        """Return whether the maps can belong to an H x W image: its aspect ratio, to one cell, and at least 1/4 of its sides."""
        h, w = self.maps_nhw.shape[1:]
        lowest, highest = min((h - 1) / height, (w - 1) / width), max((h + 1) / height, (w + 1) / width)
        large_enough = 4 * h >= height and 4 * w >= width
        return large_enough and lowest <= self.scale <= highest and proportional((h, w), (height, width))


def proportional(map_hw: tuple[int, ...], image_HW: tuple[int, int]) -> bool:
    """Return whether a map of this size has an image's aspect ratio, to one cell."""
    (h, w), (H, W) = map_hw, image_HW
    return max((h - 1) / H, (w - 1) / W) <= min((h + 1) / H, (w + 1) / W)


@dataclass
class Sample:
    """What a shard holds for one image. `image` is the image file's unchanged bytes; `seed` and `mask` are 8-bit PNGs.

    name: path of the image below its folder, without the suffix (weakclip.data.names). image_ext: one of IMAGES.
    height, width: of the image as it is used, which other parts have too. orientation: EXIF orientation by which the stored
    pixels are turned when they are decoded; 1: they are used as they are stored.
    """

    name: str
    image: bytes
    image_ext: str
    classes: tuple[int, ...]
    height: int
    width: int
    source: str
    cam: Cam | None = None
    seed: bytes | None = None
    mask: bytes | None = None
    orientation: int = 1

    @property
    def key(self) -> str:
        """The sample's key in the shard set."""
        return key_of(self.name)

    @property
    def size(self) -> tuple[int, int]:
        """H, W of the image as it is used."""
        return self.height, self.width

    def encode(self) -> dict[str, bytes]:
        """Return the sample's members: extension -> bytes."""
        about: dict[str, Any] = {"id": self.key, "height": self.height, "width": self.width}
        about |= {"classes": self.classes, "source": self.source}
        about |= {"name": self.name} if self.name != self.key else {}
        about |= {"orientation": self.orientation} if self.orientation != 1 else {}
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
    """A sample whose members, extension -> bytes, are written unchanged. source: where they come from, for messages."""

    key: str
    parts: dict[str, bytes]
    source: str

    def encode(self) -> dict[str, bytes]:
        """Return the sample's members: extension -> bytes."""
        return self.parts


@dataclass(frozen=True, eq=False)
class DecodedSample:
    """A sample as checked arrays.

    name: path of the image below its folder, without the suffix. image: uint8 H x W x 3, RGB. classes: indices 1..K-1 of the
    classes present, ascending. cam: its maps or None. seed, mask: uint8 H x W with values 0..K-1 and 255 (ignored), or None.
    orientation: EXIF orientation by which the stored pixels were turned.
    """

    name: str
    image: np.ndarray
    classes: tuple[int, ...]
    cam: Cam | None
    seed: np.ndarray | None
    mask: np.ndarray | None
    orientation: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """H, W of the image."""
        return self.image.shape[0], self.image.shape[1]


class About(NamedTuple):
    """What a sample's KEY.json says."""

    size: tuple[int, int]
    """H, W of the image as it is used."""
    classes: tuple[int, ...]
    """Indices 1..K-1 of the classes present, ascending."""
    name: str
    """Path of the image below its folder, without the suffix."""
    orientation: int
    """EXIF orientation by which the stored pixels are turned; 1: they are used as they are stored."""


@dataclass(frozen=True, eq=False)
class OpenSample:
    """A sample as training reads it: like a DecodedSample, but with the image not decoded yet.

    cam: None also where there is a seed.
    """

    entry: Entry
    about: About
    cam: Cam | None
    seed: np.ndarray | None
    parts: dict[str, bytes]

    @property
    def name(self) -> str:
        """Path of the image below its folder, without the suffix."""
        return self.entry.name

    @property
    def size(self) -> tuple[int, int]:
        """H, W of the image."""
        return self.about.size

    @property
    def classes(self) -> tuple[int, ...]:
        """Indices of the classes present, ascending."""
        return self.about.classes

    @property
    def image(self) -> np.ndarray:
        """The image at its full size, uint8 H x W x 3. Raises ShardError when it is damaged."""
        return self.decode_picture(self.size)

    def decode_picture(self, least: tuple[int, int]) -> np.ndarray:
        """Return the image, uint8 H x W x 3. A JPEG may be decoded at 1/2, 3/8, 1/4 or 1/8 of its size.

        A reduced image is at least H, W = `least`. Raises ShardError when the image is damaged.
        """
        with _naming(self.entry):
            return _decode_picture(self.parts, self.about, least)


def decode_sample(parts: dict[str, bytes], entry: Entry, num_classes: int) -> DecodedSample:
    """Decode and check one sample; `parts` is what `read_entry` returns, `num_classes` is K.

    Raises ShardError naming shard and key when a part is damaged, missing or unknown, or when the parts are inconsistent: a
    mask of another size than the image, a class outside 1..K-1, a CAM of a class that the image is not labelled with.
    """
    with _naming(entry):
        return _decode(parts, entry.key, num_classes)


def open_sample(parts: dict[str, bytes], entry: Entry, num_classes: int) -> OpenSample:
    """Return what training needs of a sample. The mask is not read, nor is the CAM where there is a seed.

    Raises ShardError as `decode_sample` does, but a damaged image is noticed only when it is decoded.
    """
    with _naming(entry):
        about = _decode_about(parts, entry.key, num_classes)
        seed_HW = decode_mask(parts.get("seed.png"), "seed.png", about.size, num_classes)
        cam = _decode_cam(parts, about) if seed_HW is None else None
        return OpenSample(entry, about, cam, seed_HW, parts)


@contextmanager
def _naming(entry: Entry) -> Iterator[None]:
    try:
        yield
    except ShardError as error:
        raise ShardError(f"{entry.shard}: {entry.key}: {error}; {REPAIR}") from None


def check_parts(parts: dict[str, bytes], key: str, num_classes: int) -> DecodedSample:
    """Return the sample that these parts are. Raises ShardError as `decode_sample` does when they are not a sample's, or when
    `key` cannot name tar members."""
    if not KEY.fullmatch(key):
        raise ShardError("a key is 1 to 80 printable ASCII characters other than . / \\; rename the image")
    return _decode(parts, key, num_classes)


def _decode(parts: dict[str, bytes], key: str, num_classes: int) -> DecodedSample:
    about = _decode_about(parts, key, num_classes)
    image_HW3, cam = _decode_picture(parts, about), _decode_cam(parts, about)
    seed_HW, mask_HW = (decode_mask(parts.get(name), name, about.size, num_classes) for name in ("seed.png", "mask.png"))
    return DecodedSample(about.name, image_HW3, about.classes, cam, seed_HW, mask_HW, about.orientation)


def _decode_about(parts: dict[str, bytes], key: str, num_classes: int) -> About:
    """Return what a sample's KEY.json says, after checking that its parts are complete."""
    if unknown := parts.keys() - _PARTS:
        raise ShardError(f"unknown part {min(unknown)!r}")
    if len(parts.keys() & IMAGES.keys()) != 1 or "json" not in parts:
        raise ShardError(f"needs one image and one json, has {', '.join(sorted(parts)) or 'nothing'}")
    try:
        about = json.loads(parts["json"])
    except (ValueError, RecursionError) as error:
        raise ShardError(f"its json cannot be read ({error})") from None
    if json_field(about, "id", str, "its json") != key:
        raise ShardError(f"its json is that of {about['id']!r}")
    json_field(about, "source", str, "its json")
    classes = json_field(about, "classes", list, "its json")
    if not all(is_count(c) and 1 <= c < num_classes for c in classes) or classes != sorted(set(classes)):
        raise ShardError(f"classes {classes!r:.80} are not ascending indices within 1..{num_classes - 1}")
    size_HW = json_field(about, "height", int, "its json"), json_field(about, "width", int, "its json")
    name, orientation = about.get("name", key), about.get("orientation", 1)
    if "name" in about and not (isinstance(name, str) and names_a_file(name) and key_of(name) == key):
        raise ShardError(f"its json has the name {name!r:.80}, whose key would be another")
    if type(orientation) is not int or not 1 <= orientation <= 8:
        raise ShardError(f"its json has the orientation {orientation!r:.40}, not 1 to 8")
    return About(size_HW, tuple(classes), name, orientation)


def _decode_cam(parts: dict[str, bytes], about: About) -> Cam | None:
    cam = Cam.decode(parts["cam.npz"]) if "cam.npz" in parts else None
    if cam and (unlabelled := set(cam.classes) - set(about.classes)):
        raise ShardError(f"CAM of class {min(unlabelled)}, which is not among the image's labels {list(about.classes)}")
    if cam and not cam.fits(*about.size):
        raise ShardError(f"CAM of {cam.maps_nhw.shape[1:]} at scale {cam.scale:.3f} does not fit an image of {about.size}")
    return cam


def _decode_picture(parts: dict[str, bytes], about: About, least: tuple[int, int] | None = None) -> np.ndarray:
    """Return the image, uint8 H x W x 3, turned by its orientation; a JPEG may be reduced as in OpenSample.decode_picture."""
    (extension,) = parts.keys() & IMAGES.keys()
    stored_HW, least_HW = (turned_size(size, about.orientation) for size in (about.size, least or about.size))
    image_HW3 = decode_jpeg(parts["jpg"], stored_HW, least_HW) if extension == "jpg" else None
    if image_HW3 is None:
        with _open_image(parts[extension], extension, stored_HW) as image:
            image_HW3 = to_rgb(image)
    return image_HW3 if about.orientation == 1 else turn(image_HW3, about.orientation)


def _open_image(data: bytes, what: str, size_HW: tuple[int, int]) -> Image.Image:
    """Return the loaded image, which must have the size (H, W). what: its part, for the decoder and messages."""
    try:
        image = Image.open(io.BytesIO(data), formats=[IMAGES[what.rpartition(".")[2]]])
        if image.size == size_HW[::-1]:  # checked first: a damaged header may claim gigabytes
            image.load()
            return image
    except Exception as error:  # a decoder of damaged bytes may raise anything
        raise ShardError(f"{what} cannot be decoded ({error})") from None
    raise ShardError(f"{what} is {image.height} x {image.width}, not {size_HW[0]} x {size_HW[1]} as its json says")


def to_rgb(image: Image.Image) -> np.ndarray:
    """Return the image as uint8 H x W x 3, as it is stored."""
    if image.mode.startswith("I"):  # 16-bit grey; convert() would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))


def decode_mask(data: bytes | None, what: str, size_HW: tuple[int, int], num_classes: int) -> np.ndarray | None:
    """Return a mask of class indices and 255, uint8 H x W; None if the sample has no such part.

    Raises ShardError naming the part `what` when it is not an 8-bit PNG of this size or holds a class outside 0..K-1.
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
