"""Making CAMs: the labelled set `data.labelled`, with a CAM for each labelled sample, becomes `data.train`, shard by shard."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from weakclip import labels, registry
from weakclip.config import Config, ConfigError, SeedConfig
from weakclip.data.codecs import encode_mask_png
from weakclip.data.index import Entry, Index, open_index, select_numbers
from weakclip.data.reading import read_entry
from weakclip.data.sample import Cam, DecodedSample, PackedSample, decode_sample
from weakclip.datasets import writing
from weakclip.registry import CAM_SOURCES
from weakclip.runtime.workers import WorkerPool, cores, map_images

_log = logging.getLogger(__name__)


def open_labelled(config: Config) -> Index:
    """Open the set at `data.labelled`. Raises ConfigError where the recipe has none, UserError where its classes do not match."""
    if config.data.labelled is None:
        raise ConfigError("data.labelled is null; set it to the shard set with image labels that CAMs are made for")
    return open_index(config.data.labelled, labels.class_names(config.classes), config.data)


def provenance(config: Config, labelled: Index | None) -> dict[str, Any]:
    """Return what decides the CAMs, except the template, for JSON. Images and weights that do not exist yet are left out."""
    images = {"of": labelled.fingerprint} if labelled else {}
    seeds = {"seeds": asdict(config.seeds)} if config.seeds.crf else {}
    source = registry.load(CAM_SOURCES[config.cam.source].provenance)(config)
    return {**images, **seeds, **source, "scale": config.data.scale}


def written(config: Config, labelled: Index | None) -> int:
    """Return the number of shards with CAMs that exist. Raises ConfigError when `data.train` holds something else."""
    found = writing.written(Path(config.data.train), provenance(config, labelled), "data.train", "cam")
    return found[0] if found else 0


@dataclass
class WithCam:
    """Load a sample of a labelled set and add the CAM that `make` computes and, with `seeds.crf`, its seed mask.

    Several threads may call it. It notes images without labels and empty maps, for `warnings`.
    """

    labelled: Index
    make: Callable[[DecodedSample], Cam]
    seeds: SeedConfig
    workers: WorkerPool
    """Pool that computes the seed masks."""
    unlabelled: list[str] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    """The class of each all-zero map."""

    def __call__(self, entry: Entry) -> PackedSample:
        parts = read_entry(self.labelled, entry)
        sample = decode_sample(parts, entry, len(self.labelled.classes))
        parts.pop("cam.npz", None)
        if sample.classes:
            cam = self.make(sample)
            self.empty.extend(index for index, map_hw in zip(cam.classes, cam.maps_nhw, strict=True) if not map_hw.any())
            parts["cam.npz"] = cam.encode()
            if self.seeds.crf:  # too slow to repeat in each epoch
                own = replace(sample, cam=cam, seed=None, mask=None)
                seed_mask = partial(registry.load("weakclip.masks.seeds:seed_mask"), config=self.seeds)
                parts["seed.png"] = encode_mask_png(self.workers.run(seed_mask, own))
        else:
            self.unlabelled.append(entry.key)
        return PackedSample(entry.key, parts, f"{self.labelled.storage}/{entry.shard}")

    def warnings(self) -> list[str]:
        """Return one line for each kind of problem found."""
        lines = []
        if self.unlabelled:
            named = ", ".join(self.unlabelled[:10]) + (", ..." if len(self.unlabelled) > 10 else "")
            lines.append(f"{len(self.unlabelled)} images have no label and get no CAM: {named}")
        if self.empty:
            counted = sorted(Counter(self.empty).items())
            counts = ", ".join(f"{self.labelled.classes[index]} {count}" for index, count in counted)
            lines.append(f"{len(self.empty)} maps are all zero, by class: {counts}")
        return lines


def run(config: Config, part: str | None) -> None:
    """Run the stage `cam`: write those of the shards "A:B" that are missing in `data.train`.

    Several images are in progress; on a CPU each uses one core. The task that writes the last shard completes the set.
    """
    labelled = open_labelled(config)
    shards = len(labelled.shards)
    if written(config, labelled) == shards:
        return
    numbers = select_numbers(shards, part, str(labelled.storage))
    make, note = registry.load(CAM_SOURCES[config.cam.source].maker)(config, labelled)
    processes = cores() if config.pseudo.processes is None else config.pseudo.processes
    with WorkerPool(processes if config.seeds.crf else 0) as workers:
        load = WithCam(labelled, make, config.seeds, workers)
        build = writing.Build(
            labelled.entries,
            load,
            Path(config.data.train).resolve(),
            labelled.classes,
            [len(shard.samples) for shard in labelled.shards],
            {**provenance(config, labelled), **note},
            version=lambda entry: entry.key,  # its content is in the provenance, as the fingerprint of the labelled set
        )
        build.run(numbers=numbers, apply=lambda load, entries: map_images(load, processes, entries))
    for line in load.warnings():
        _log.warning(line)
