"""New images of the synthetic world for trainings of any length, drawn in a process beside the training."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from weakclip.data.photometric import IMAGENET
from weakclip.demo import world
from weakclip.runtime.workers import die_with_parent

TRAIN_SEED, PROBE_SEED, TEST_SEED, BACKBONE_SEED = (
    n * 10**9 for n in (1, 2, 3, 4)
)  # the demo's own images have seeds up to 10**6

Captions = tuple[str, ...]


def network_input(images: np.ndarray) -> Tensor:
    """Normalise images: uint8 [B, H, W, 3] -> float [B, 3, H, W]."""
    # Contiguous: torch 2.13's dilated convolutions crash in the backward pass of channels-last images on CPU.
    return IMAGENET.apply(torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous())


def _draw(seed: int, start: int, count: int, size: int, close_up: bool) -> tuple[np.ndarray, list[Captions]]:
    pictures = [world.picture(seed, start + i, size, close_up=close_up) for i in range(count)]
    return np.stack([p.image for p in pictures]), [p.captions for p in pictures]


class Pool:
    """The latest `room` images of an endless series. A worker draws `first` images, then `fresh` for every batch taken.

    Drawing an image costs about as much as training on it, so each one is used a few times.
    """

    room = 4096

    def __init__(self, worker: ProcessPoolExecutor, seed: int, size: int, close_up: bool, fresh: int, first: int = 512) -> None:
        self.worker, self.series, self.fresh = worker, (size, close_up), fresh
        self.seed, self.drawn = seed, 0
        self.images = np.empty((self.room, size, size, 3), np.uint8)
        self.captions: list[Captions] = [()] * self.room
        self._order(first)
        self._receive()

    def _order(self, count: int) -> None:
        self.coming = self.worker.submit(_draw, self.seed, self.drawn, count, *self.series)

    def _receive(self) -> None:
        for image, captions in zip(*self.coming.result(), strict=True):
            self.images[self.drawn % self.room], self.captions[self.drawn % self.room] = image, captions
            self.drawn += 1
        self._order(self.fresh)

    def take(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[Captions]]:
        """Return `count` different images of the pool, uint8 [B, H, W, 3], and their captions."""
        self._receive()
        chosen = rng.choice(min(self.drawn, self.room), count, replace=False)
        return self.images[chosen], [self.captions[i] for i in chosen]


def drawing_process() -> ProcessPoolExecutor:
    """Start a process of low priority that draws images, and that ends with the training, even if that is killed."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_stand_back)


def _stand_back() -> None:
    die_with_parent()
    os.nice(10)


def clock(name: str, total: float, done: float) -> tqdm:
    """Return a progress bar over seconds of training."""
    shape = "{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s, {remaining} left{postfix}"
    return tqdm(total=total, initial=done, desc=name, bar_format=shape, mininterval=1)
