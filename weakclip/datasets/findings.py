"""What looks wrong in samples that can be read: labels, CAMs, seeds and masks that disagree.

Shapes: H W image pixels.
"""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from weakclip.data.codecs import png_palette
from weakclip.data.names import printable
from weakclip.data.orientation import orientation_of
from weakclip.data.sample import IMAGES, DecodedSample
from weakclip.labels import IGNORE

KINDS = {
    "no map": "the CAM has no map of a class that the image is labelled with, which trains as background",
    "seed": "the seed holds a class that the image is not labelled with",
    "mask": "the mask holds a class that the image is not labelled with",
    "empty seed": "the seed holds no class, only 0 and 255; a class index is needed, not black and white",
    "empty mask": "the mask holds no class, only 0 and 255; a class index is needed, not black and white",
}
"""Disagreements within a sample. With `--strict` each is an error."""

ORIENTATION = "orientation"
_TURNED = "the image has an EXIF orientation and is used as it is stored; --exif upright turns it, with its masks and CAM"

_log = logging.getLogger(__name__)

_SHOWN, _COLOURS = 3, 10_000


@dataclass
class Findings:
    """What was found in a number of samples. It can be merged with that of others and stored as JSON."""

    images: Counter[str] = field(default_factory=Counter)
    """Number of images by kind."""
    first: dict[str, list[str]] = field(default_factory=dict)
    """The names of some images of each kind."""
    classes: dict[str, Counter[str]] = field(default_factory=dict)
    """Number of images by kind and class name."""
    colours: dict[str, Counter[str]] = field(default_factory=dict)
    """Number of masks in which a colour of the palette stands for a class, by "part colour" and class name."""
    colour_first: dict[str, str] = field(default_factory=dict)
    """Name of the first of these images, by "part colour class"."""

    def add(self, sample: DecodedSample, parts: Mapping[str, bytes], classes: Sequence[str]) -> list[str]:
        """Add what is found in one sample, and return the disagreements, a line each. parts: its members, by extension."""
        masks = {"seed": sample.seed, "mask": sample.mask}
        values = {part: _values(mask_HW) for part, mask_HW in masks.items() if mask_HW is not None}
        found = dict(_disagreements(sample, values))
        for kind, indices in {**found, **_orientation(sample, parts)}.items():
            self.images[kind] += 1
            self.first.setdefault(kind, []).append(printable(sample.name))
            del self.first[kind][_SHOWN:]
            self.classes.setdefault(kind, Counter()).update(classes[index] for index in indices)
        for part, used in values.items():
            self._add_colours(part, printable(sample.name), png_palette(parts[f"{part}.png"]), used, classes)
        return [f"{KINDS[kind]}{_named(classes[index] for index in indices)}" for kind, indices in found.items()]

    def _add_colours(self, part: str, name: str, palette: bytes | None, used: Iterable[int], classes: Sequence[str]) -> None:
        if palette is None or len(self.colours) >= _COLOURS:
            return
        colours = {index: palette[3 * index : 3 * index + 3].hex() for index in used if index != IGNORE}
        often = Counter(colours.values())
        for index, colour in colours.items():
            if colour and often[colour] == 1:  # a palette may have one colour for several indices
                self.colours.setdefault(f"{part} {colour}", Counter())[classes[index]] += 1
                self.colour_first.setdefault(f"{part} {colour} {classes[index]}", name)

    def merge(self, other: Findings) -> None:
        """Add what was found in other samples."""
        self.images.update(other.images)
        for kind, names in other.first.items():
            self.first[kind] = (self.first.get(kind, []) + names)[:_SHOWN]
        for own, others in ((self.classes, other.classes), (self.colours, other.colours)):
            for name, counts in others.items():
                own.setdefault(name, Counter()).update(counts)
        self.colour_first = other.colour_first | self.colour_first

    def as_dict(self) -> dict[str, Any]:
        """Return the findings for JSON."""
        return vars(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Findings:
        """Return what `as_dict` gave, after JSON."""
        counters = {name: {key: Counter(counts) for key, counts in raw.get(name, {}).items()} for name in ("classes", "colours")}
        return cls(Counter(raw.get("images")), raw.get("first", {}), **counters, colour_first=raw.get("colour_first", {}))

    def report(self, strict: bool) -> int:
        """Log what was found, disagreements as warnings or with `strict` as errors, and return the number of these errors."""
        lines = self.disagreements()
        for line in lines:
            _log.log(logging.ERROR if strict else logging.WARNING, "%s", line)
        for line in self.notes():
            _log.info("%s", line)
        return len(lines) if strict else 0

    def disagreements(self) -> list[str]:
        """Return a line for each kind of disagreement, with the number of images and some of their names."""
        lines = [self._line(kind, text) for kind, text in KINDS.items() if self.images[kind]]
        return lines + list(self._palettes())

    def notes(self) -> list[str]:
        """Return lines on what is not a disagreement."""
        return [self._line(ORIENTATION, _TURNED)] if self.images[ORIENTATION] else []

    def _line(self, kind: str, text: str) -> str:
        named = ", ".join(self.first[kind]) + (", ..." if self.images[kind] > len(self.first[kind]) else "")
        counts = ", ".join(f"{name} {count}" for name, count in self.classes[kind].most_common(10))
        by_class = f" (by class: {counts})" if counts else ""
        return f"{self.images[kind]} images: {text}{by_class}: {named}"

    def _palettes(self) -> Iterator[str]:
        for of, counts in self.colours.items():
            (usual, most), *others = counts.most_common()
            part, colour = of.split()
            for name, count in others:
                where = self.colour_first[f"{of} {name}"]
                yield (
                    f"{count} {part}s, such as that of {where}, have colour #{colour} for {name}, {most} have it for {usual}: "
                    "their palettes are in another order; are their class indices?"
                )


def _values(mask_HW: np.ndarray) -> list[int]:
    """Return the values in a mask, ascending."""
    return np.flatnonzero(np.bincount(mask_HW.ravel(), minlength=256)).tolist()


def _disagreements(sample: DecodedSample, values: Mapping[str, list[int]]) -> Iterator[tuple[str, list[int]]]:
    """Yield kinds and the classes concerned. values: those in the seed and in the mask."""
    if sample.cam is not None and sample.seed is None and (without := set(sample.classes) - set(sample.cam.classes)):
        yield "no map", sorted(without)
    for part, found in values.items():
        held = set(found) - {0, IGNORE}
        if sample.classes and (unlabelled := held - set(sample.classes)):
            yield part, sorted(unlabelled)
        # Without labels a mask of background alone may be right, and one that ignores pixels too is likely black and white.
        if not held and (sample.classes or IGNORE in found):
            yield f"empty {part}", []


def _orientation(sample: DecodedSample, parts: Mapping[str, bytes]) -> dict[str, list[int]]:
    """Return the kind ORIENTATION where the image has one, and is not turned by it."""
    (extension,) = parts.keys() & IMAGES.keys()
    with Image.open(io.BytesIO(parts[extension])) as image:
        return {} if sample.orientation != 1 or orientation_of(image) == 1 else {ORIENTATION: []}


def _named(names: Iterable[str]) -> str:
    listed = ", ".join(names)
    return f": {listed}" if listed else ""
