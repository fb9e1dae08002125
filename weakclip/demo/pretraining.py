"""A training on pictures of other worlds, for as many steps as it is given; interrupted, it goes on from its last save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from weakclip.demo import image_pool
from weakclip.demo.image_pool import Captions, Pool
from weakclip.demo.resumable import State

PEAK_LR = 1e-3

Loss = Callable[[Tensor, list[Captions]], Tensor]
"""Of normalised pictures, B x 3 x H x W, and their captions."""


def pretrain(name: str, networks: Mapping[str, nn.Module], loss_of: Loss, steps: int, close_ups: float, state: Path) -> None:
    """Train `networks`, first on close-ups of half the side for so large a share (0..1) of the steps, then on whole pictures.

    state: file from which an interrupted training goes on.
    """
    parameters = [parameter for network in networks.values() for parameter in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps, pct_start=0.05)
    kept = State(state, {**networks, "optimizer": optimizer, "schedule": schedule})
    first = int(kept.restore().get("step", 0))
    with image_pool.drawing_process() as worker:
        drawn = _batches(worker, first, steps, round(close_ups * steps))
        for step, (images, captions) in (bar := tqdm(drawn, name, steps, initial=first, unit="step", disable=None)):
            loss = loss_of(image_pool.network_input(images), captions)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            kept.save(step=step + 1)
    kept.remove()


def _batches(
    worker: ProcessPoolExecutor, first: int, steps: int, close_ups: int
) -> Iterator[tuple[int, tuple[np.ndarray, list[Captions]]]]:
    """Number, pictures and captions of each step that is left. After an interruption the pictures are new ones."""
    rng, series = np.random.default_rng(first), image_pool.BACKBONE_SEED + first
    if first < close_ups:
        pool = Pool(worker, series, 96, True, fresh=4)
        for step in range(first, close_ups):
            yield step, pool.take(16, rng)
    pool = Pool(worker, series, 192, False, fresh=2)
    for step in range(max(first, close_ups), steps):
        yield step, pool.take(8, rng)
