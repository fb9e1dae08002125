"""Tar shards -> batches, in the order of the plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from weakclip.config import Config, SeedConfig
from weakclip.data import plan, transforms
from weakclip.data.shard import DecodedSample, Entry, Index, ShardError, decode_sample, read_entry
from weakclip.labels import check_same
from weakclip.seeds import cam_to_seed


class Batch(NamedTuple):
    keys: list[str]
    images: Tensor
    """uint8 B x 3 x c x c."""
    seeds: Tensor
    """int64 B x c x c."""
    photometric: Tensor
    """float32 B x 5: the draws that transforms.to_device applies."""
    bad: list[str]
    """What was wrong with samples that were skipped on the way, one line each."""


def open_index(path: str, class_names: Sequence[str]) -> Index:
    """The shard set at `path`, whose class list must be `class_names`."""
    index = Index.load(path)
    check_same(class_names, index.classes, str(index.root))
    return index


def load(index: Index, entry: Entry) -> DecodedSample:
    """One sample, by one seek and one read. Raises ShardError when it is damaged."""
    return decode_sample(read_entry(index.root, entry), entry, len(index.classes))


def cam_maps(sample: DecodedSample) -> np.ndarray:
    """The sample's activation maps at the image's size, float32 n x H x W in 0..1. Raises ShardError where it has none."""
    H, W = sample.image.shape[:2]
    if sample.cam is None:
        if sample.classes:
            raise ShardError(f"{sample.key}: neither CAM nor seed; build the shards with --cams")
        return np.zeros((0, H, W), np.float32)
    maps_nHW = [transforms.resize_image(map_hw.astype(np.float32) / 255, (H, W)) for map_hw in sample.cam.maps_nhw]
    return np.stack(maps_nHW) if maps_nHW else np.zeros((0, H, W), np.float32)


def seed_mask(sample: DecodedSample, config: SeedConfig) -> np.ndarray:
    """The sample's own seed mask, or the one its CAM gives: uint8 H x W."""
    if sample.seed is not None:
        return sample.seed
    classes = sample.cam.classes if sample.cam else ()
    return cam_to_seed(cam_maps(sample), classes, config.background, config.foreground)


@dataclass(frozen=True)
class TrainingSamples(IterableDataset[dict[str, Any]]):
    """Iterates over the augmented samples of the micro-batches that this loader process is to make."""

    index: Index
    config: Config
    consumed: int
    rank: int
    ranks: int

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        sizes = tuple(len(shard.samples) for shard in self.index.shards)
        order = plan.Plan(sizes, self.config.seed, self.config.data.shuffle_window)
        entries = self.index.entries
        batch = self.config.train.batch
        for positions in plan.micro_batches(self.consumed, batch, self.ranks, self.rank, workers, worker):
            for position in positions:
                yield self._load(order, entries, position)

    def _load(self, order: plan.Plan, entries: Sequence[Entry], position: int) -> dict[str, Any]:
        """The sample at `position`, or the next readable one, so that every rank's batch stays full."""
        bad = []
        for epoch, number in order.successors(position):
            try:
                sample = load(self.index, entries[number])
                seed_HW = seed_mask(sample, self.config.seeds)
            except ShardError as error:
                bad.append(str(error))
                if len(bad) > self.config.data.max_bad_samples:
                    break
                continue
            rng = plan.generator(self.config.seed, epoch, number)
            image, seed, draws = transforms.augment(sample.image, seed_HW, rng, self.config.augment, self.config.data.scale)
            return {"key": sample.key, "image": image, "seed": seed, "photometric": draws, "bad": bad}
        raise ShardError(too_many_bad(bad, self.config.data.max_bad_samples))


def too_many_bad(bad: Sequence[str], limit: int) -> str:
    return f"more than data.max_bad_samples={limit} unreadable samples; the last: {bad[-1]}"


def collate(samples: Sequence[dict[str, Any]]) -> Batch:
    return Batch(
        keys=[sample["key"] for sample in samples],
        images=torch.from_numpy(np.stack([sample["image"] for sample in samples])).permute(0, 3, 1, 2).contiguous(),
        seeds=torch.from_numpy(np.stack([sample["seed"] for sample in samples])).long(),
        photometric=torch.from_numpy(np.stack([sample["photometric"] for sample in samples])),
        bad=[message for sample in samples for message in sample["bad"]],
    )


def training_batches(index: Index, config: Config, consumed: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
    """Endless micro-batches of one rank, going on after `consumed` samples of the whole run."""
    samples = TrainingSamples(index, config, consumed, rank, ranks)
    pipeline = wds.DataPipeline(samples, wds.batched(config.train.batch, collation_fn=collate, partial=False))
    workers = config.data.workers
    return _unwrapped(wds.WebLoader(pipeline, batch_size=None, num_workers=workers, pin_memory=torch.cuda.is_available()))


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
        return _unwrapped(DataLoader(decoding, batch_size=None, num_workers=self.workers, collate_fn=_identity))


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


def _unwrapped(loader: Iterable[Any]) -> Iterator[Any]:
    """The loader's items; a loader process wraps an error's one line in its traceback, here it comes out again."""
    try:
        yield from loader
    except ShardError as error:
        raise ShardError(str(error).strip().splitlines()[-1].rpartition("ShardError: ")[2]) from None


def select_shards(index: Index, subset: str | None) -> list[Entry]:
    """Samples of the shards that `subset` picks: null for all, "3" for one, "0:8" for a range counted like Python's.

    Raises ValueError when it is none of these or picks nothing.
    """
    if subset is None:
        return list(index.entries)
    shards = index.shards
    try:
        first, *rest = (int(part) if part else None for part in subset.split(":"))
        chosen = shards[slice(first, *rest)] if rest else (shards[int(subset)],)
    except (ValueError, IndexError, TypeError):
        chosen = ()
    if not chosen:
        raise ValueError(f"--shards {subset}: {index.root} has shards 0..{len(shards) - 1}; write 3 for one, 0:8 for a range")
    return [entry for shard in chosen for entry in shard.samples]
