"""Tar shards -> batches, in the order of the plan."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info

from weakclip.config import Config
from weakclip.data import plan, transforms
from weakclip.data.index import Entry, Index, ShardError
from weakclip.data.reading import load, read_and_decode
from weakclip.data.sample import DecodedSample, OpenSample, open_sample
from weakclip.data.storage import StorageError
from weakclip.runtime.signals import held_back, obey_only_the_parent


class Batch(NamedTuple):
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
    """What was wrong with samples that were skipped on the way, one line each."""


class Candidate(NamedTuple):
    source: Index
    entry: Entry
    key: tuple[int, ...]
    """Of the generator that the sample is augmented with."""


class Source:
    """One shard set in training: its samples in its own order."""

    def __init__(self, index: Index, key: tuple[int, ...], window: int) -> None:
        sizes = [len(shard.samples) for shard in index.shards]
        self.index, self.order = index, plan.Order(sizes, key, window)
        self._starts = np.cumsum([0, *sizes])
        self._window: plan.Window | None = None

    def candidates(self, position: int) -> Iterator[Candidate]:
        """The sample at a position of this source's order, then those that replace it if it is damaged."""
        self._prefetch(position)
        for epoch, number in self.order.successors(position):
            shard = int(np.searchsorted(self._starts, number, side="right")) - 1
            entry = self.index.shards[shard].samples[number - self._starts[shard]]
            yield Candidate(self.index, entry, (plan.AUGMENT, *self.order.key, epoch, number))

    def _prefetch(self, position: int) -> None:
        """As reading enters a window: fetch its shards, then those of the next one."""
        window = self.order.window_at(position)
        if window is not self._window:
            self._window = window
            shards = [*window.shards, *self.order.following(window, position).shards]
            self.index.storage.prefetch([self.index.shards[shard] for shard in shards])


@dataclass(frozen=True)
class TrainingSamples(IterableDataset[dict[str, Any]]):
    """Iterates over the augmented samples of the micro-batches that this loader process is to make.

    target: what a sample is trained towards, uint8 H x W of its image's size.
    """

    sources: tuple[Index, ...]
    config: Config
    consumed: int
    rank: int
    ranks: int
    target: Callable[[OpenSample], np.ndarray]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        config = self.config
        sources = [Source(index, (config.seed, number), config.data.shuffle_window) for number, index in enumerate(self.sources)]
        mix = plan.Mix((1.0, *config.data.mix.values()), config.seed)
        for positions in plan.micro_batches(self.consumed, config.train.batch, self.ranks, self.rank, workers, worker):
            for position in positions:
                number, place = mix.at(position)
                yield self._load(sources[number].candidates(place))

    def _load(self, candidates: Iterator[Candidate]) -> dict[str, Any]:
        """The first readable one, so that every rank's batch stays full."""
        bad: list[str] = []
        for index, entry, key in candidates:
            try:
                augmented = partial(self._augmented, entry, len(index.classes), key)
                return {"key": entry.key, **read_and_decode(index, entry, augmented), "bad": bad}
            except ShardError as error:
                bad.append(str(error))
                if len(bad) > self.config.data.max_bad_samples:
                    break
        raise ShardError(too_many_bad(bad, self.config.data.max_bad_samples))

    def _augmented(self, entry: Entry, num_classes: int, key: tuple[int, ...], parts: dict[str, bytes]) -> dict[str, np.ndarray]:
        """The picture is decoded last, when it is known at which size it is needed."""
        sample = open_sample(parts, entry, num_classes)
        image, seed, draws = transforms.augment(
            sample.decode_picture,
            self.target(sample),
            sample.classes,
            plan.generator(*key),
            self.config.augment,
            self.config.data.scale,
        )
        labels_K = np.zeros(num_classes, np.uint8)
        labels_K[list(sample.classes)] = 1
        return {"image": image, "seed": seed, "labels": labels_K, "photometric": draws}


def too_many_bad(bad: Sequence[str], limit: int) -> str:
    return f"more than data.max_bad_samples={limit} unreadable samples; the last: {bad[-1]}"


def collate(samples: Sequence[dict[str, Any]]) -> Batch:
    """Into memory that is shared, in a loader process."""
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
    config: Config,
    target: Callable[[OpenSample], np.ndarray],
    consumed: int = 0,
    rank: int = 0,
    ranks: int = 1,
    mixed: Sequence[Index] = (),
) -> Generator[Batch]:
    """Endless micro-batches of one rank, going on after `consumed` samples of the whole run.

    target: as of TrainingSamples. mixed: the sets that `data.mix` weighs, in its order.
    """
    samples = TrainingSamples((index, *mixed), config, consumed, rank, ranks, target)
    pipeline = wds.DataPipeline(samples, wds.batched(config.train.batch, collation_fn=collate, partial=False))
    workers = config.data.workers
    loader = DataLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=obey_only_the_parent,
    )
    return _unwrapped(loader)


@dataclass(frozen=True)
class StoredSamples:
    """`entries` as they lie in the shards, decoded in order and ahead of their use. A damaged one raises ShardError."""

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
    """The loader's items; a loader process wraps an error's one line in its traceback, here it comes out again."""
    with held_back():
        iterator = iter(loader)  # this forks the processes
    try:
        yield from iterator
    except (ShardError, StorageError) as error:
        raise type(error)(str(error).strip().splitlines()[-1].rpartition(f"{type(error).__name__}: ")[2]) from None
