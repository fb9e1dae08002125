"""Sliding windows x scales x mirror images -> class probabilities of a whole image.

Windows of one shape go through the network in batches, whichever scales and mirror images of the image they come from: from the
scale on at which both sides reach the window, that is all of them (48 of the 52 of a 375 x 500 image in the published recipe),
enough to fill a GPU. Images never share a batch, so an image's probabilities do not depend on which others a task has, or has
still to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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

Size = transforms.Size


class Predictor(NamedTuple):
    """What inference asks of a network."""

    logits: Callable[[Tensor], Tensor]
    """Normalised images, B x 3 x H x W, to logits, B x K x h x w, at a resolution of its own."""
    num_classes: int
    normalisation: Normalisation
    least_side: int
    """Pixels; smaller images are padded."""
    device: torch.device


class View(NamedTuple):
    """One way to look at the image."""

    size: Size
    """H, W that it is resized to."""
    mirrored: bool


@torch.inference_mode()
def predict(predictor: Predictor, image_HW3: np.ndarray, config: InferenceConfig, scale: Sequence[int]) -> Tensor:
    """Probabilities, float32 K x H x W on the predictor's device, averaged over scales and mirror images.

    image_HW3: uint8 RGB. scale: `data.scale`.
    (Released code: aug_test; each pass is windows -> logits at the image's size -> softmax -> mirrored back.)
    """
    return joined(predict_tiles(predictor, image_HW3, config, scale))


@torch.inference_mode()
def predict_tiles(predictor: Predictor, image_HW3: np.ndarray, config: InferenceConfig, scale: Sequence[int]) -> Tiles:
    """The same in tiles of TILE pixels, or in one on a GPU."""
    return _tiles(predictor, image_HW3, scaled_sizes(image_HW3, config, scale), config)


def average(predictor: Predictor, image_HW3: np.ndarray, sizes: Sequence[Size], config: InferenceConfig) -> Tensor:
    """Mean probabilities, float32 K x H x W, over the image resized to `sizes` (H, W), and over their mirror images."""
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
    """For images too large for `predict_tiles`: a function that gives its rows of tiles, one at a time and in host memory.

    It can be called again; between calls only the network's logits are kept, whose size `data.scale` bounds.
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
    """Logits, float32 K x H x W, of a normalised image: windows, averaged where they overlap."""
    view = View((x_3HW.shape[1], x_3HW.shape[2]), mirrored=False)
    logits = _forwards(predictor, _windows(view, x_3HW, config), config.window_batch)
    return logits_of(_side_by_side(predictor, view, logits, view.size, config))


# ------------------------------------------------------------------------------------------------------------------ parts


def scaled_sizes(image_HW3: np.ndarray, config: InferenceConfig, scale: Sequence[int]) -> list[Size]:
    H, W = image_HW3.shape[:2]
    return [transforms.scaled_size(H, W, scale, factor) for factor in config.scales]


def views(sizes: Sequence[Size], config: InferenceConfig) -> list[View]:
    return [View(size, mirrored) for size in sizes for mirrored in ((False, True) if config.flip else (False,))]


def passes(predictor: Predictor, image_HW3: np.ndarray, seen: Iterable[View], config: InferenceConfig) -> Iterator[Pass]:
    """The image's views through the network, each as soon as all its windows are there; views with windows of one shape follow
    each other, so that one open view and one batch is all that is held."""
    ordered = sorted(seen, key=lambda view: _shape(view.size, config))

    def windows() -> Iterator[Tensor]:
        for view in ordered:
            x_HW3 = torch.from_numpy(transforms.resize_image(image_HW3, view.size)).to(predictor.device)
            x_3HW = predictor.normalisation.apply(x_HW3.permute(2, 0, 1).float())
            yield from _windows(view, x_3HW.flip(2) if view.mirrored else x_3HW, config)

    logits = _forwards(predictor, windows(), config.window_batch)
    image = image_HW3.shape[0], image_HW3.shape[1]
    return (_side_by_side(predictor, view, logits, image, config) for view in ordered)


def _shape(size: Size, config: InferenceConfig) -> Size:
    """Of windows, pixels."""
    return min(config.window, size[0]), min(config.window, size[1])


def _windows(view: View, x_3HW: Tensor, config: InferenceConfig) -> Iterator[Tensor]:
    """3 x h x w each, row by row."""
    h, w = _shape(view.size, config)
    for y in starts(view.size[0], config.window, config.stride):
        for x in starts(view.size[1], config.window, config.stride):
            yield x_3HW[:, y : y + h, x : x + w]


def _forwards(predictor: Predictor, windows: Iterable[Tensor], batch: int) -> Iterator[Tensor]:
    """Each window's logits, float32 K x h x w at the network's resolution, in order."""
    for _, alike in groupby(windows, key=lambda x_3hw: x_3hw.shape):
        while part := list(islice(alike, batch)):
            yield from forward(predictor, torch.stack(part))


def forward(predictor: Predictor, x_B3HW: Tensor) -> Tensor:
    """Logits, float32 B x K x h x w. A side too small for the network is padded, and the logits are the padded window's."""
    H, W = x_B3HW.shape[2:]
    return predictor.logits(F.pad(x_B3HW, (0, _padded(W, predictor) - W, 0, _padded(H, predictor) - H))).float()


def _padded(side: int, predictor: Predictor) -> int:
    return max(side, predictor.least_side)


def _side_by_side(predictor: Predictor, view: View, logits: Iterator[Tensor], image: Size, config: InferenceConfig) -> Pass:
    """The next windows of `logits`, which are those of `view`. image: H, W that they are wanted at."""
    down, across = (starts(side, config.window, config.stride) for side in view.size)
    logits_Krc = torch.cat([torch.cat([next(logits) for _ in across], dim=2) for _ in down], dim=1)
    h, w = _shape(view.size, config)
    r, c = logits_Krc.shape[1] // len(down), logits_Krc.shape[2] // len(across)
    rows = Grid(tuple(down), h, _padded(h, predictor), r, image[0])
    return Pass(logits_Krc, rows, Grid(tuple(across), w, _padded(w, predictor), c, image[1], view.mirrored))


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride`, the last one moved back so that it ends with the image."""
    return [min(start, max(length - window, 0)) for start in range(0, max(length - window, 0) + stride, stride)]
