"""Sliding-window inference with multi-scale and flip test-time augmentation -> class probabilities of a whole image.

Windows of one shape go through the network in batches, whichever scales and flips of the image they come from. From the scale at
which both sides reach the window, all windows have one shape (48 of the 52 of a 375 x 500 image in the published recipe), enough
to fill a GPU. Those full windows may run compiled, in batches of one size; a batch that is more than half full is filled up.
Images never share a batch, so an image's probabilities do not depend on which other images a task has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby, islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weakclip.config import InferenceConfig
from weakclip.data import transforms
from weakclip.data.photometric import Normalisation
from weakclip.masks.upsampling import TILE, WHOLE, Grid, Pass, Tiles, add_probabilities, blank, joined, logits_of
from weakclip.runtime import compilation

Size = transforms.Size
BATCHES = {"cpu": 4, "cuda": 16}
"""Windows per forward pass where `window_batch` is null, by device."""


class Predictor(NamedTuple):
    """What inference needs of a network."""

    logits: Callable[[Tensor], Tensor]
    """Normalised images, B x 3 x H x W -> logits, B x K x h x w, at the network's own resolution."""
    num_classes: int
    normalisation: Normalisation
    least_side: int
    """Smallest side that the network takes, in pixels; smaller images are padded."""
    device: torch.device
    compiled: bool = False
    """Whether the network is compiled for batches of full windows."""


class View(NamedTuple):
    """One test-time augmentation of the image: a scale, flipped or not."""

    size: Size
    """H, W that the image is resized to."""
    flipped: bool
    """Whether it is flipped horizontally."""


@torch.inference_mode()
def predict(predictor: Predictor, image_HW3: np.ndarray, config: InferenceConfig, scale: Sequence[int]) -> Tensor:
    """Return the probabilities, float32 K x H x W on the predictor's device, averaged over scales and flips.

    image_HW3: uint8 RGB. scale: `data.scale`.
    (Released code: aug_test; each pass is windows -> logits at the image's size -> softmax -> flipped back.)
    """
    return joined(predict_tiles(predictor, image_HW3, config, scale))


@torch.inference_mode()
def predict_tiles(predictor: Predictor, image_HW3: np.ndarray, config: InferenceConfig, scale: Sequence[int]) -> Tiles:
    """Return the same as `predict` in tiles of TILE pixels, or on a GPU in a single tile."""
    return _tiles(predictor, image_HW3, scaled_sizes(image_HW3, config, scale), config)


def average(predictor: Predictor, image_HW3: np.ndarray, sizes: Sequence[Size], config: InferenceConfig) -> Tensor:
    """Return the mean probabilities, float32 K x H x W, over the image resized to `sizes` (H, W) and over their flips."""
    return joined(_tiles(predictor, image_HW3, sizes, config))


def _tiles(predictor: Predictor, image_HW3: np.ndarray, sizes: Sequence[Size], config: InferenceConfig) -> Tiles:
    H, W = image_HW3.shape[:2]
    seen, tile = views(sizes, config), TILE if predictor.device.type == "cpu" else WHOLE
    total = blank(predictor.num_classes, H, W, tile, predictor.device)
    for part in passes(predictor, image_HW3, seen, config):
        add_probabilities(total, part, 1 / len(seen), tile)
    return total


@torch.inference_mode()
def predict_in_strips(
    predictor: Predictor, image_HW3: np.ndarray, config: InferenceConfig, scale: Sequence[int]
) -> Callable[[], Iterator[list[Tensor]]]:
    """Return a function that yields the rows of tiles of `predict_tiles`, one at a time and in host memory, for large images.

    The function can be called again; between calls only the network's logits are kept, whose size `data.scale` bounds.
    """
    seen = views(scaled_sizes(image_HW3, config, scale), config)
    made = [part._replace(logits_Krc=part.logits_Krc.cpu()) for part in passes(predictor, image_HW3, seen, config)]
    H, W = image_HW3.shape[:2]

    def strips() -> Iterator[list[Tensor]]:
        for number, first in enumerate(range(0, H, TILE)):
            total = blank(predictor.num_classes, min(TILE, H - first), W, TILE, torch.device("cpu"))
            for part in made:
                add_probabilities(total, part, 1 / len(seen), TILE, number)
            yield total[0]

    return strips


def slide(predictor: Predictor, x_3HW: Tensor, config: InferenceConfig) -> Tensor:
    """Return the logits of a normalised image, float32 K x H x W: those of its windows, averaged where they overlap."""
    view = View((x_3HW.shape[1], x_3HW.shape[2]), flipped=False)
    logits = _forwards(predictor, _windows(view, x_3HW, config), config)
    return logits_of(_side_by_side(predictor, view, logits, view.size, config))


# ------------------------------------------------------------------------------------------------------------------ parts


def scaled_sizes(image_HW3: np.ndarray, config: InferenceConfig, scale: Sequence[int]) -> list[Size]:
    """Return the H, W of the image at each of the config's scales."""
    H, W = image_HW3.shape[:2]
    return [transforms.scaled_size(H, W, scale, factor) for factor in config.scales]


def views(sizes: Sequence[Size], config: InferenceConfig) -> list[View]:
    """Return the views of an image at `sizes`: each size, and if `config.flip` also its flip."""
    return [View(size, flipped) for size in sizes for flipped in ((False, True) if config.flip else (False,))]


def passes(predictor: Predictor, image_HW3: np.ndarray, seen: Iterable[View], config: InferenceConfig) -> Iterator[Pass]:
    """Run the image's views through the network and yield each as soon as all its windows are done. Views with windows of one
    shape follow each other, so that only one unfinished view and one batch are held."""
    ordered = sorted(seen, key=lambda view: _shape(view.size, config))

    def windows() -> Iterator[Tensor]:
        for view in ordered:
            x_HW3 = torch.from_numpy(transforms.resize_image(image_HW3, view.size)).to(predictor.device)
            x_3HW = predictor.normalisation.apply(x_HW3.permute(2, 0, 1).float())
            yield from _windows(view, x_3HW.flip(2) if view.flipped else x_3HW, config)

    logits = _forwards(predictor, windows(), config)
    image = image_HW3.shape[0], image_HW3.shape[1]
    return (_side_by_side(predictor, view, logits, image, config) for view in ordered)


def _shape(size: Size, config: InferenceConfig) -> Size:
    """Return h, w of the windows of an image of H, W = `size`, in pixels."""
    return min(config.window, size[0]), min(config.window, size[1])


def _windows(view: View, x_3HW: Tensor, config: InferenceConfig) -> Iterator[Tensor]:
    """Yield the windows, 3 x h x w each, row by row."""
    h, w = _shape(view.size, config)
    for y in starts(view.size[0], config.window, config.stride):
        for x in starts(view.size[1], config.window, config.stride):
            yield x_3HW[:, y : y + h, x : x + w]


def _forwards(predictor: Predictor, windows: Iterable[Tensor], config: InferenceConfig) -> Iterator[Tensor]:
    """Yield the logits of each window, float32 K x h x w at the network's resolution, in order."""
    batch = config.window_batch or BATCHES[predictor.device.type]
    for (_, h, w), alike in groupby(windows, key=lambda x_3hw: x_3hw.shape):
        while part := list(islice(alike, batch)):
            compiled = predictor.compiled and h == w == config.window and 2 * len(part) > batch
            with compilation.in_turn(compiled) if predictor.compiled else nullcontext():
                filled = part + part[:1] * (batch - len(part)) if compiled else part
                logits_BKhw = forward(predictor, torch.stack(filled))
            yield from logits_BKhw[: len(part)]


def forward(predictor: Predictor, x_B3HW: Tensor) -> Tensor:
    """Return the logits, float32 B x K x h x w. A side too small for the network is padded; the logits cover the padding too."""
    H, W = x_B3HW.shape[2:]
    return predictor.logits(F.pad(x_B3HW, (0, _padded(W, predictor) - W, 0, _padded(H, predictor) - H))).float()


def _padded(side: int, predictor: Predictor) -> int:
    return max(side, predictor.least_side)


def _side_by_side(predictor: Predictor, view: View, logits: Iterator[Tensor], image: Size, config: InferenceConfig) -> Pass:
    """Return the pass made of the next windows of `logits`, those of `view`. image: H, W to which it will be upsampled."""
    down, across = (starts(side, config.window, config.stride) for side in view.size)
    logits_Krc = torch.cat([torch.cat([next(logits) for _ in across], dim=2) for _ in down], dim=1)
    h, w = _shape(view.size, config)
    r, c = logits_Krc.shape[1] // len(down), logits_Krc.shape[2] // len(across)
    rows = Grid(tuple(down), h, _padded(h, predictor), r, image[0])
    return Pass(logits_Krc, rows, Grid(tuple(across), w, _padded(w, predictor), c, image[1], view.flipped))


def starts(length: int, window: int, stride: int) -> list[int]:
    """Return the starts of the windows along a side: every `stride`, with the last one moved back to end with the image."""
    return [min(start, max(length - window, 0)) for start in range(0, max(length - window, 0) + stride, stride)]
