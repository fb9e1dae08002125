"""Training on images of other worlds for a number of steps. An interrupted training resumes from its last save."""

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
"""A function of normalised images, B x 3 x H x W, and their captions -> loss."""


def pretrain(name: str, networks: Mapping[str, nn.Module], loss_of: Loss, steps: int, close_ups: float, state: Path) -> None:
    """Train `networks`, first on close-ups of half the side, then on whole images.

    close_ups: share (0..1) of the steps on close-ups. state: file from which an interrupted training resumes.
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
    """Yield number, images and captions of each remaining step. After an interruption the images are new ones."""
    rng, series = np.random.default_rng(first), image_pool.BACKBONE_SEED + first
    if first < close_ups:
        pool = Pool(worker, series, 96, True, fresh=4)
        for step in range(first, close_ups):
            yield step, pool.take(16, rng)
    pool = Pool(worker, series, 192, False, fresh=2)
    for step in range(max(first, close_ups), steps):
        yield step, pool.take(8, rng)
