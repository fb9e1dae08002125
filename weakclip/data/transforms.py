"""Geometric augmentation, in the loader, on 8-bit arrays: random resize, crop, flip and pad.

What is drawn depends only on the sample's random generator. Image and seed get the same transform.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import cv2
import numpy as np

from weakclip.config import AugmentConfig
from weakclip.labels import IGNORE

Size = tuple[int, int]
"""H, W in pixels."""
Window = tuple[slice, slice]
"""Rows and columns."""

cv2.setNumThreads(0)  # a loader process has one core


def scaled_size(H: int, W: int, scale: Sequence[int], factor: float) -> Size:
    """Return the size of an H x W image resized, keeping its aspect ratio, into `scale` (long, short side) times `factor`."""
    long_side, short_side = (int(side * factor) for side in scale)
    ratio = min(long_side / max(H, W), short_side / min(H, W))
    return max(1, int(H * ratio + 0.5)), max(1, int(W * ratio + 0.5))


def resize_image(image_HWC: np.ndarray, size: Size) -> np.ndarray:
    """Return the image resized bilinearly to H, W = `size`, without anti-aliasing as published (mmcv resizes with OpenCV)."""
    return cv2.resize(image_HWC, size[::-1], interpolation=cv2.INTER_LINEAR)


class _Span(NamedTuple):
    """One axis of a part of an image that is resized separately: the part, its new length, and the wanted slice of that."""

    part: slice
    length: int
    wanted: slice


def resize_window(image_HW3: np.ndarray, whole: Size, size: Size, window: Window) -> np.ndarray:
    """Return `resize_image(image, size)[window]`, uint8 h x w x 3, computing little more than the window.

    whole: the image's H, W; `image_HW3` may be the image reduced to n/8, rounded up, as JPEG decoders return it.
    """
    eighths = 8 * image_HW3.shape[1] // whole[1]
    rows, columns = (_span(part, side, length, eighths) for part, side, length in zip(window, whole, size, strict=True))
    part_HW3 = resize_image(image_HW3[rows.part, columns.part], (rows.length, columns.length))
    return part_HW3[rows.wanted, columns.wanted]


def _span(window: slice, whole: int, length: int, eighths: int) -> _Span:
    """Return the part to resize for `window`, a slice of the new pixels.

    A part is resized as in the whole image if it begins and ends where edges of old and new pixels coincide. Edges may be 1/64
    of an old pixel apart: a pixel's value then changes by at most 1/64 of the difference to its neighbour. The part is an old
    pixel longer than the window at both ends, because its outermost new pixels lack neighbours.
    """
    extent = whole * eighths / 8
    step, margin = extent / length, math.ceil(length / extent)
    first, last = max(window.start - margin, 0), min(window.stop + margin, length)
    while first > 0 and abs(first * step - round(first * step)) > 1 / 64:
        first -= 1
    while last < length and abs(last * step - round(last * step)) > 1 / 64:
        last += 1
    end = math.ceil(extent) if last == length else round(last * step)
    return _Span(slice(round(first * step), end), last - first, slice(window.start - first, window.stop - first))


@dataclass(frozen=True)
class Crop:
    """A square of an image resized to `size`, flipped if `flip`, and padded at the bottom and right where the image ends."""

    size: Size
    top: int
    left: int
    side: int
    flip: bool

    @property
    def window(self) -> Window:
        """Rows and columns of the resized image that the crop shows."""
        H, W = self.size
        return slice(self.top, min(self.top + self.side, H)), slice(self.left, min(self.left + self.side, W))

    def of_image(self, image_HW3: np.ndarray, whole: Size) -> np.ndarray:
        """Return the crop of an image, uint8 side x side x 3, padded with black. See `resize_window` for the arguments."""
        return self.finish(resize_window(image_HW3, whole, self.size, self.window), 0)

    def finish(self, shown: np.ndarray, fill: int) -> np.ndarray:
        """Return the flipped and padded crop, given what it shows of the resized image or seed. fill: the padding value."""
        bottom, right = self.side - shown.shape[0], self.side - shown.shape[1]
        shown = cv2.flip(shown, 1) if self.flip else shown
        if not (bottom or right):
            return shown
        return cv2.copyMakeBorder(shown, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=(fill,) * 3)


def augment(
    decode: Callable[[Size], np.ndarray],
    seed_HW: np.ndarray,
    classes: Sequence[int],
    rng: np.random.Generator,
    config: AugmentConfig,
    scale: Sequence[int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Resize, crop, flip and pad at random -> image uint8 c x c x 3, seed uint8 c x c, photometric draws float32 [5].

    decode: returns the image, or a reduced version (see `resize_window`) of at least the H, W it is called with. classes: the
    classes that the seed is likely to hold, which only saves time.
    """
    crop, seed_cc = draw_crop(seed_HW, classes, rng, config, scale)
    draws = draw_photometric(rng) if config.photometric else np.zeros(5, np.float32)
    H, W = seed_HW.shape
    return crop.of_image(decode(crop.size), (H, W)), seed_cc, draws


def draw_crop(
    seed_HW: np.ndarray, classes: Sequence[int], rng: np.random.Generator, config: AugmentConfig, scale: Sequence[int]
) -> tuple[Crop, np.ndarray]:
    """Return a random crop and its seed, uint8 c x c. While one class covers too much of the seed, up to ten crops are drawn."""
    size = scaled_size(seed_HW.shape[0], seed_HW.shape[1], scale, rng.uniform(config.ratio[0], config.ratio[1]))
    likely = (0, *classes) if seed_HW.max() < IGNORE else (IGNORE, 0, *classes)
    # Only what is needed of the resized seed is computed: all columns at once, but rows, which are fast to copy, per crop.
    wide_HW = _resize_nearest(seed_HW, (seed_HW.shape[0], size[1]))
    shown_rows = _resize_nearest(np.arange(seed_HW.shape[0], dtype=np.float32)[:, None], (size[0], 1))[:, 0].astype(np.intp)
    for _ in range(10):
        top, left = (int(rng.integers(max(side - config.crop, 0) + 1)) for side in size)
        crop = Crop(size, top, left, config.crop, flip=False)
        rows, columns = crop.window
        shown_HW = wide_HW[:, columns][shown_rows[rows]]
        if not _one_class_covers(config.max_class_share, shown_HW, likely):
            break
    crop = replace(crop, flip=bool(rng.random() < config.flip))
    return crop, crop.finish(shown_HW, IGNORE)


def _resize_nearest(seed_HW: np.ndarray, size: Size) -> np.ndarray:
    return cv2.resize(seed_HW, size[::-1], interpolation=cv2.INTER_NEAREST)


def _one_class_covers(share: float, seed_HW: np.ndarray, likely: Sequence[int]) -> bool:
    """Return whether one class covers `share` or more of the pixels that are not ignored.

    likely: values to count first, IGNORE before all others; if these few counts decide, the others are not needed.
    """
    seeded = others = seed_HW.size
    for value in likely:
        count = int(np.count_nonzero(seed_HW == value))
        others -= count
        if value == IGNORE:
            seeded = others
        elif count >= share * seeded:
            return True
        elif others < share * seeded:
            return False
    return bool(np.bincount(seed_HW.ravel(), minlength=256)[:IGNORE].max() >= share * seeded)


def draw_photometric(rng: np.random.Generator) -> np.ndarray:
    """Return the draws, float32 [5]: brightness shift, contrast and saturation factors (0: unchanged), hue shift (degrees), and
    whether contrast comes last (0 or 1)."""
    brightness, contrast, saturation, hue, *coins = rng.random(9).tolist()
    values = 64 * brightness - 32, contrast + 0.5, saturation + 0.5, 2 * (int(36 * hue) - 18), 1
    return np.array([value * (coin < 0.5) for value, coin in zip(values, coins, strict=True)], np.float32)
