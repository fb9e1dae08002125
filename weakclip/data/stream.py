"""The stream of batches from tar shards, in the order of the plan."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from weakclip.config import AugmentConfig, Config, DataConfig
from weakclip.data import plan, shared_memory, transforms
from weakclip.data.index import Entry, Index, ShardError
from weakclip.data.reading import load, read_and_decode
from weakclip.data.sample import DecodedSample, OpenSample, open_sample
from weakclip.data.storage import StorageError
from weakclip.runtime.signals import held_back, obey_only_the_parent

PREFETCHED = 2
"""Batches that each loader process makes ahead of their use."""


class Batch(NamedTuple):
    """A micro-batch of B augmented crops of c x c pixels."""

    keys: list[str]
    images: Tensor
    """uint8 B x 3 x c x c, in memory B x c x c x 3."""
    seeds: Tensor
    """uint8 B x c x c."""
    labels: Tensor
    """uint8 B x K: 1 for each class that the whole image has."""
    photometric: Tensor
    """float32 B x 5: the draws that photometric.distort applies."""
    bad: list[str]
    """One line for each damaged sample that was skipped."""


class Candidate(NamedTuple):
    """A sample that may be used at a position of the stream."""

    source: Index
    entry: Entry
    key: tuple[int, ...]
    """Key of the random generator that augments the sample."""


class Source:
    """One shard set in training, which has its own order of samples."""

    def __init__(self, index: Index, key: tuple[int, ...], window: int) -> None:
        sizes = [len(shard.samples) for shard in index.shards]
        self.index, self.order = index, plan.Order(sizes, key, window)
        self._starts = np.cumsum([0, *sizes])
        self._window: plan.Window | None = None

    def candidates(self, position: int) -> Iterator[Candidate]:
        """Yield the sample at a position of this source's order, then those that replace it if it is damaged."""
        self._prefetch(position)
        for epoch, number in self.order.successors(position):
            shard = int(np.searchsorted(self._starts, number, side="right")) - 1
            entry = self.index.shards[shard].samples[number - self._starts[shard]]
            yield Candidate(self.index, entry, (plan.AUGMENT, *self.order.key, epoch, number))

    def _prefetch(self, position: int) -> None:
        """Fetch the shards of a window when reading enters it, then those of the next window."""
        window = self.order.window_at(position)
        if window is not self._window:
            self._window = window
            shards = [*window.shards, *self.order.following(window, position).shards]
            self.index.storage.prefetch([self.index.shards[shard] for shard in shards])


@dataclass(frozen=True)
class StreamSettings:
    """What decides the stream of batches: a run resumes exactly if these are unchanged."""

    data: DataConfig
    augment: AugmentConfig
    seed: int
    batch: int
    """Images per rank and micro-step."""

    def require_shared_memory(self) -> None:
        """Raise UserError where shared memory cannot hold what the loader processes of a node's ranks make ahead."""
        batch = self.batch * self.augment.crop**2 * 4  # images and seeds
        here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_STEP_TASKS_PER_NODE") or "1"
        ranks = int(re.match(r"\d+", here)[0])  # type: ignore[index]  # Slurm's is such as 8(x2)
        shared_memory.require(ranks * self.data.workers * PREFETCHED * batch)

    @classmethod
    def of(cls, config: Config) -> StreamSettings:
        """Return the settings of WeakCLIP's own training."""
        return cls(config.data, config.augment, config.seed, config.train.batch)


@dataclass(frozen=True)
class TrainingSamples(IterableDataset[dict[str, Any]]):
    """Iterates over the augmented samples of the micro-batches that this loader process produces.

    target: returns the mask that a sample is trained on, uint8 H x W of its image's size.
    """

    sources: tuple[Index, ...]
    settings: StreamSettings
    consumed: int
    rank: int
    ranks: int
    target: Callable[[OpenSample], np.ndarray]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        seed, data = self.settings.seed, self.settings.data
        sources = [Source(index, (seed, number), data.shuffle_window) for number, index in enumerate(self.sources)]
        mix = plan.Mix((1.0, *data.mix.values()), seed)
        for positions in plan.micro_batches(self.consumed, self.settings.batch, self.ranks, self.rank, workers, worker):
            for position in positions:
                number, place = mix.at(position)
                yield self._load(sources[number].candidates(place))

    def _load(self, candidates: Iterator[Candidate]) -> dict[str, Any]:
        """Return the first readable candidate, so that every rank's batch stays full."""
        bad: list[str] = []
        for index, entry, key in candidates:
            try:
                augmented = partial(self._augmented, entry, len(index.classes), key)
                return {"key": entry.key, **read_and_decode(index, entry, augmented), "bad": bad}
            except ShardError as error:
                bad.append(str(error))
                if len(bad) > self.settings.data.max_bad_samples:
                    break
        raise ShardError(too_many_bad(bad, self.settings.data.max_bad_samples))

    def _augmented(self, entry: Entry, num_classes: int, key: tuple[int, ...], parts: dict[str, bytes]) -> dict[str, np.ndarray]:
        """Decode and augment one sample. The image is decoded last, when the size at which it is needed is known."""
        sample = open_sample(parts, entry, num_classes)
        image, seed, draws = transforms.augment(
            sample.decode_picture,
            self.target(sample),
            sample.classes,
            plan.generator(*key),
            self.settings.augment,
            self.settings.data.scale,
        )
        labels_K = np.zeros(num_classes, np.uint8)
        labels_K[list(sample.classes)] = 1
        return {"image": image, "seed": seed, "labels": labels_K, "photometric": draws}


def too_many_bad(bad: Sequence[str], limit: int) -> str:
    """Return the error message for more than `limit` unreadable samples."""
    return f"more than data.max_bad_samples={limit} unreadable samples; the last: {bad[-1]}"


def collate(samples: Sequence[dict[str, Any]]) -> Batch:
    """Return the samples as a batch; a loader process places it in shared memory."""
    return Batch(
        keys=[sample["key"] for sample in samples],
        images=default_collate([sample["image"] for sample in samples]).permute(0, 3, 1, 2),
        seeds=default_collate([sample["seed"] for sample in samples]),
        labels=default_collate([sample["labels"] for sample in samples]),
        photometric=default_collate([sample["photometric"] for sample in samples]),
        bad=[message for sample in samples for message in sample["bad"]],
    )


def training_batches(
    index: Index,
    settings: StreamSettings,
    target: Callable[[OpenSample], np.ndarray],
    consumed: int = 0,
    rank: int = 0,
    ranks: int = 1,
    mixed: Sequence[Index] = (),
) -> Generator[Batch]:
    """Yield micro-batches of one rank without end, starting after `consumed` samples of the whole run.

    target: as in TrainingSamples. mixed: the sets of `data.mix`, in its order. Raises UserError when shared memory is used up.
    """
    samples = TrainingSamples((index, *mixed), settings, consumed, rank, ranks, target)
    pipeline = wds.DataPipeline(samples, wds.batched(settings.batch, collation_fn=collate, partial=False))
    workers = settings.data.workers
    loader = DataLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=PREFETCHED if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=obey_only_the_parent,
    )
    return _unwrapped(loader)


@dataclass(frozen=True)
class StoredSamples:
    """The stored samples `entries`, decoded in order and ahead of their use. A damaged one raises ShardError."""

    index: Index
    entries: Sequence[Entry]
    workers: int

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[DecodedSample]:
        decoding = _Decoding(self.index, self.entries)
        loader = DataLoader(
            decoding, batch_size=None, num_workers=self.workers, collate_fn=_identity, worker_init_fn=obey_only_the_parent
        )
        return _unwrapped(loader)


@dataclass(frozen=True)
class _Decoding(Dataset[DecodedSample]):
    index: Index
    entries: Sequence[Entry]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> DecodedSample:
        return load(self.index, self.entries[number])


def _identity(sample: Any) -> Any:
    return sample


def _unwrapped(loader: DataLoader[Any]) -> Generator[Any]:
    """Yield the loader's items. A loader process wraps the line of an error in its traceback; this raises the line alone."""
    try:
        with held_back():
            iterator = iter(loader)  # this forks the processes
        yield from iterator
    except (RuntimeError, OSError) as error:
        if exhausted := shared_memory.exhausted(error):
            raise exhausted from None
        raise
    except (ShardError, StorageError) as error:
        raise type(error)(str(error).strip().splitlines()[-1].rpartition(f"{type(error).__name__}: ")[2]) from None
