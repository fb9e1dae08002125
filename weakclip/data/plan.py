"""Which sample comes when: pure functions of the seed, never of ranks or workers.

Global positions 0, 1, 2, ... run through one shuffled epoch after another. Step s consumes positions s * G .. (s + 1) * G - 1
(G: global batch), so the batches are the same for any number of ranks, and a run resumed at any position goes on exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


def generator(*key: int) -> np.random.Generator:
    """A counter-based generator for `key`, such as (seed, epoch, sample): the same wherever and whenever it is made."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@lru_cache(maxsize=2)
def epoch_order(sizes: tuple[int, ...], seed: int, epoch: int, window: int) -> np.ndarray:
    """Sample indices in the order of `epoch`, int64 [n]; `sizes` are the shards' sample counts.

    Shards are shuffled, then samples within groups of `window` shards, so that reading stays close together.
    """
    rng = generator(seed, epoch)
    starts = np.cumsum([0, *sizes])
    shards = rng.permutation(len(sizes))
    groups = [shards[first : first + window] for first in range(0, len(shards), window)]
    return np.concatenate([rng.permutation(np.concatenate([np.arange(starts[s], starts[s + 1]) for s in g])) for g in groups])


@dataclass(frozen=True)
class Plan:
    """The order of samples for shards of `sizes` samples."""

    sizes: tuple[int, ...]
    seed: int
    window: int

    def __post_init__(self) -> None:
        if sum(self.sizes) == 0:
            raise ValueError("the training shards hold no sample")

    def sample(self, position: int) -> tuple[int, int]:
        """(epoch, sample index) at a global position."""
        epoch, place = divmod(position, sum(self.sizes))
        return epoch, int(epoch_order(self.sizes, self.seed, epoch, self.window)[place])

    def successors(self, position: int) -> Iterator[tuple[int, int]]:
        """What stands at `position`, then what follows it in the same epoch, once around: replacements for a bad sample."""
        total = sum(self.sizes)
        first = position - position % total
        for step in range(total):
            yield self.sample(first + (position - first + step) % total)


def micro_batches(consumed: int, batch: int, ranks: int, rank: int, workers: int = 1, worker: int = 0) -> Iterator[Sequence[int]]:
    """Positions of each micro-batch that `worker` of `rank` loads, after `consumed` samples of the whole run.

    Ranks take neighbouring slices; workers take turns, which is the order in which a DataLoader asks them.
    """
    first = consumed + rank * batch
    stride = batch * ranks
    number = worker
    while True:
        start = first + number * stride
        yield range(start, start + batch)
        number += workers
