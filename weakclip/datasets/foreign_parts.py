"""The parts of a sample in tars of other tools: images by any suffix, captions, and labels as class numbers."""

from __future__ import annotations

import io
import json
import re

from PIL import Image

from weakclip.data.index import ShardError
from weakclip.data.sample import Sample

IMAGES = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp"}
"""Suffix of an image, in any case -> part of our format."""

LABELS = "cls"
"""Part with class numbers as text, as in webdataset: a number, or several with spaces or commas between them."""

CLS = ("foreground0", "class")
"""What such a number means: a foreground class, counted from 0 (torchvision, webdataset), or an index of the class list."""


def part_of(extension: str) -> str:
    """Return what our format calls a member's extension, which is that itself for anything but an image."""
    return IMAGES.get(extension.lower(), extension)


def is_ours(data: bytes) -> bool:
    """Return whether a sample's json is ours rather than another tool's notes, such as img2dataset's with url and caption.

    What cannot be read counts as ours, so that its error names it.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return True
    return not isinstance(found, dict) or not {"id", "classes", "source"}.isdisjoint(found)


def with_json(parts: dict[str, bytes], key: str, source: str, num_classes: int, cls: str | None) -> dict[str, bytes]:
    """Return the parts of a sample without our json, with one that is made of its image and its labels, if it has any.

    cls: one of CLS. Raises ShardError naming the part at fault.
    """
    rest = dict(parts)
    numbers = rest.pop(LABELS, None)
    classes = () if numbers is None else _classes(numbers, f"{key}.{LABELS}", num_classes, cls)
    images = rest.keys() & set(IMAGES.values())
    if len(images) != 1:
        raise ShardError(f"needs one image, has {', '.join(sorted(rest)) or 'nothing'}")
    (extension,) = images
    height, width = _size(rest[extension], f"{key}.{extension}")
    return Sample(key, rest[extension], extension, classes, height, width, source).encode() | rest


def _classes(data: bytes, where: str, num_classes: int, cls: str | None) -> tuple[int, ...]:
    text = data.decode("ascii", "replace").strip()
    if cls is None:
        meanings = "foreground0 (foreground classes from 0, as torchvision counts) or class (indices of --classes)"
        raise ShardError(f"{where}: {text!r:.20} may count with or without the background; say it by --cls {meanings}")
    first = 1 if cls == "foreground0" else 0
    words = re.split(r"[\s,]+", text) if text else []
    if not all(word.isdecimal() and 1 <= int(word) + first < num_classes for word in words):
        allowed = f"{1 - first}..{num_classes - 1 - first}"
        raise ShardError(f"{where}: {text!r:.40} is not made of class numbers {allowed} (--cls {cls})")
    return tuple(sorted({int(word) + first for word in words}))


def _size(data: bytes, where: str) -> tuple[int, int]:
    """Return (H, W) from an image's header."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"]) as image:
            return image.height, image.width
    except Exception:  # a decoder of damaged bytes may raise anything
        raise ShardError(f"{where}: {'not a JPEG, PNG or WebP image' if data else 'is empty'}") from None
