"""The order of the samples: pure functions of the seed, never of nodes, ranks or workers.

Global positions 0, 1, 2, ... run through one shuffled epoch after another. Step s consumes the positions s * G .. (s + 1) * G - 1
(G: global batch), so the batches are the same for any number of ranks, and a run resumes exactly at any position; its state is
the seed and the number of samples consumed. Nothing is ever as long as an epoch: memory and time depend on the number of shards
and the samples of one window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from weakclip.runtime.errors import UserError

# The purpose of a generator is the first word of its key, so that no two purposes ever draw the same numbers.
SHARDS, WINDOW, MIX, AUGMENT = 1, 2, 3, 4


def generator(*key: int) -> np.random.Generator:
    """Return a counter-based generator that depends only on `key`, such as (AUGMENT, seed, epoch, sample)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


class Window(NamedTuple):
    """Shards that are shuffled together, and the order of their samples."""

    first: int
    """Place of its first sample in the epoch."""
    shards: np.ndarray
    """int64: number of each shard in the set."""
    samples: np.ndarray
    """int64: number of each sample in the set, in order."""


class Order:
    """The endless order of the samples of one shard set: each exactly once per epoch.

    Each epoch shuffles the shards, then the samples within windows of `window` shards, so that reads stay close together.
    """

    def __init__(self, sizes: Sequence[int], key: tuple[int, ...], window: int) -> None:
        """sizes: samples per shard. key: what the order is a function of, such as (seed, number of the set). window: number of
        shards that are shuffled together. Raises UserError if there is no sample.
        """
        self.key, self.window = key, window
        self._starts = np.cumsum([0, *sizes])
        self.total = int(self._starts[-1])
        if self.total == 0:
            raise UserError("the training shards hold no sample")
        # A stream is read in order, so the current epoch and window are enough; replacements may look one further.
        self._epoch: Callable[[int], tuple[np.ndarray, np.ndarray]] = lru_cache(2)(self._shuffle_shards)
        self._window: Callable[[int, int], Window] = lru_cache(4)(self._shuffle_window)

    def sample(self, position: int) -> tuple[int, int]:
        """Return (epoch, number of the sample in the set) at a position."""
        epoch, place = divmod(position, self.total)
        window = self.window_at(position)
        return epoch, int(window.samples[place - window.first])

    def window_at(self, position: int) -> Window:
        """Return the window in which a position lies."""
        epoch, place = divmod(position, self.total)
        _, ends = self._epoch(epoch)
        return self._window(epoch, int(np.searchsorted(ends, place, side="right")))

    def following(self, window: Window, position: int) -> Window:
        """Return the window after `window`, in which `position` lies."""
        return self.window_at(position - position % self.total + window.first + len(window.samples))

    def successors(self, position: int) -> Iterator[tuple[int, int]]:
        """Yield the sample at `position`, then those that follow in the same epoch, once around: they replace a bad sample."""
        first = position - position % self.total
        for step in range(self.total):
            yield self.sample(first + (position - first + step) % self.total)

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards in the epoch's order, and the place in the epoch at which each window ends."""
        shards = generator(SHARDS, *self.key, epoch).permutation(len(self._starts) - 1)
        ends = np.cumsum(np.diff(self._starts)[shards])
        return shards, ends[[*range(self.window - 1, len(ends) - 1, self.window), len(ends) - 1]]

    def _shuffle_window(self, epoch: int, number: int) -> Window:
        shards, ends = self._epoch(epoch)
        chosen = shards[number * self.window : (number + 1) * self.window]
        samples = np.concatenate([np.arange(self._starts[s], self._starts[s + 1]) for s in chosen])
        rng = generator(WINDOW, *self.key, epoch, number)
        return Window(int(ends[number - 1]) if number else 0, chosen, rng.permutation(samples))


class Mix:
    """Several orders in one: in every block of positions each source has the share that its weight gives, in shuffled places.

    So each source runs through its own epochs exactly, however often the others repeat.
    """

    BLOCK = 1000

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        """weights: how often each source is drawn, relative to the others; at least a thousandth of all."""
        self.seed = seed
        exact = np.array(weights, float) / sum(weights) * self.BLOCK
        self.quotas = np.floor(exact).astype(int)
        # The rest of the block goes to the largest remainders.
        self.quotas[np.argsort(self.quotas - exact, kind="stable")[: self.BLOCK - self.quotas.sum()]] += 1
        assert self.quotas.all(), f"{weights}: a source would never come"
        self._block: Callable[[int], tuple[np.ndarray, np.ndarray]] = lru_cache(2)(self._shuffle_block)

    def at(self, position: int) -> tuple[int, int]:
        """Return (number of the source, position in that source's own order) at a global position."""
        block, place = divmod(position, self.BLOCK)
        sources, counts = self._block(block)
        source = int(sources[place])
        return source, block * int(self.quotas[source]) + int(counts[place])

    def _shuffle_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source at each place of the block, and how often it came before in the block."""
        sources = generator(MIX, self.seed, block).permutation(np.repeat(np.arange(len(self.quotas)), self.quotas))
        counts = np.zeros(self.BLOCK, int)
        for source, quota in enumerate(self.quotas):
            counts[sources == source] = np.arange(quota)
        return sources, counts


def micro_batches(consumed: int, batch: int, ranks: int, rank: int, workers: int = 1, worker: int = 0) -> Iterator[range]:
    """Yield the positions of each micro-batch that `worker` of `rank` loads, after `consumed` samples of the whole run.

    Ranks take adjacent slices; workers take turns, in the order in which a DataLoader asks them.
    """
    stride = batch * ranks
    start = consumed + rank * batch + worker * stride
    while True:
        yield range(start, start + batch)
        start += workers * stride
