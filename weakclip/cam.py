"""Make class activation maps from image labels: the shard set `cam.data`, with CAMs, becomes `data.train`.

python -m weakclip.cam --config configs/cam/clip.yaml [--shards 0:8] [key=value ...]
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from weakclip import cli, labels
from weakclip.checkpoints.clip_files import place, weights_file
from weakclip.config import Config, ConfigError, CrfConfig, SeedConfig
from weakclip.data.index import Entry, Index, sha256
from weakclip.data.reading import read_entry
from weakclip.data.sample import Cam, DecodedSample, PackedSample, decode_sample
from weakclip.datasets import writing
from weakclip.masks import mask_folder
from weakclip.training.jobs import Classify

if TYPE_CHECKING:
    from weakclip.cams.texts import PromptedClip

PROMPT = "prompt"
"""In the set's build.json: the template that was taken."""


def open_labelled(config: Config) -> Index:
    """The set at `cam.data`. Raises ConfigError where the recipe has none, ValueError where it is of other classes."""
    if config.cam.data is None:
        raise ConfigError("cam.data is null: it names the shard set with labels that CAMs are made for")
    index = Index.load(config.cam.data, config.data)
    labels.check_same(labels.class_names(config.classes), index.classes, str(index.storage))
    return index


def about(config: Config, labelled: Index | None) -> dict[str, Any]:
    """What decides the CAMs beside the template, for JSON; without pictures and weights that aren't there yet."""
    pictures = {"of": labelled.fingerprint} if labelled else {}
    seeds = {"seeds": asdict(config.seeds)} if config.seeds.crf else {}
    return {**pictures, **seeds, **_SOURCES[config.cam.source].about(config), "scale": config.data.scale}


def written(config: Config, labelled: Index | None) -> int:
    """How many shards with CAMs are there. Raises ConfigError when `data.train` is something else."""
    found = writing.written(Path(config.data.train), about(config, labelled), "data.train", "cam")
    return found[0] if found else 0


@dataclass
class WithCam:
    """An entry of a labelled set -> the same sample with the CAM that `make` gives it, with `seeds.crf` its seed mask too, and a
    note of what is wanting."""

    labelled: Index
    make: Callable[[DecodedSample], Cam]
    seeds: SeedConfig
    unlabelled: list[str] = field(default_factory=list)
    empty: Counter[int] = field(default_factory=Counter)
    """Of each class the maps that are all zero."""

    def __call__(self, entry: Entry) -> PackedSample:
        parts = read_entry(self.labelled, entry)
        sample = decode_sample(parts, entry, len(self.labelled.classes))
        parts.pop("cam.npz", None)
        if sample.classes:
            cam = self.make(sample)
            self.empty.update(index for index, map_hw in zip(cam.classes, cam.maps_nhw, strict=True) if not map_hw.any())
            parts["cam.npz"] = cam.encode()
            if self.seeds.crf:
                parts["seed.png"] = self._seed(sample, cam, self.seeds.crf)
        else:
            self.unlabelled.append(entry.key)
        return PackedSample(entry.key, parts, f"{self.labelled.storage}/{entry.shard}")

    def _seed(self, sample: DecodedSample, cam: Cam, crf: CrfConfig) -> bytes:
        from weakclip.masks.seeds import cam_maps, refined_seed

        maps_nHW, thresholds = cam_maps(replace(sample, cam=cam)), (self.seeds.background, self.seeds.foreground)
        return mask_folder.encode(refined_seed(maps_nHW, cam.classes, sample.image, *thresholds, crf))

    def warnings(self) -> list[str]:
        """One line for each kind of want."""
        lines = []
        if self.unlabelled:
            named = ", ".join(self.unlabelled[:10]) + (", ..." if len(self.unlabelled) > 10 else "")
            lines.append(f"warning: {len(self.unlabelled)} images have no label, so no CAM: {named}")
        if self.empty:
            counts = ", ".join(f"{self.labelled.classes[index]} {count}" for index, count in sorted(self.empty.items()))
            lines.append(f"warning: {self.empty.total()} maps are empty, nothing was found of the class: {counts}")
        return lines


def run(config: Config, part: str | None) -> None:
    """The stage: those of the shards "A:B" that are missing in `data.train`; who writes the last makes the set whole."""
    labelled = open_labelled(config)
    shards = len(labelled.shards)
    if written(config, labelled) == shards:
        return
    from weakclip.data.index import select_numbers  # torch, which the login node that counts shards need not load

    numbers = select_numbers(shards, part, str(labelled.storage))
    source = _SOURCES[config.cam.source]
    make, note = source.maker(config, labelled)
    load = WithCam(labelled, make, config.seeds)
    build = writing.Build(
        labelled.entries,
        load,
        Path(config.data.train).resolve(),
        labelled.classes,
        [len(shard.samples) for shard in labelled.shards],
        {**about(config, labelled), **note},
        version=lambda entry: entry.key,  # what is in it stands in `about`
    )
    build.run(numbers=numbers)
    for line in load.warnings():
        print(line, file=sys.stderr)


class Source(NamedTuple):
    """What makes CAMs."""

    about: Callable[[Config], dict[str, Any]]
    """What decides them, for JSON."""
    maker: Callable[[Config, Index], tuple[Callable[[DecodedSample], Cam], dict[str, Any]]]
    """Makes them of one sample; and what was found out on the way, for JSON."""


def _made_by(path: Path) -> dict[str, str]:
    weights = weights_file(path)
    return {} if weights is None else {"weights": sha256(weights)}


def _about_clip(config: Config) -> dict[str, Any]:
    clip, options = config.clip, asdict(config.cam)
    del options["data"]  # its content counts, wherever it lies, and that of the weights
    return {"cam": options, "clip": {"model": clip.model, "image_size": clip.image_size}, **_made_by(place(clip.pretrained))}


def _by_clip(config: Config, labelled: Index) -> tuple[Callable[[DecodedSample], Cam], dict[str, Any]]:
    from weakclip.cams.texts import PromptedClip

    clip = PromptedClip(config, labelled.classes)
    template = choose(config, clip, labelled)
    return lambda sample: clip.cam(sample, template), {PROMPT: template}


def _about_mctformer(config: Config) -> dict[str, Any]:
    names = ("source", "scales", "flip", "attention_blocks", "affinity_steps")
    weights = Classify(config).run / "weights" / "last.safetensors"
    return {"cam": {name: getattr(config.cam, name) for name in names}, **_made_by(weights)}


def _by_mctformer(config: Config, _labelled: Index) -> tuple[Callable[[DecodedSample], Cam], dict[str, Any]]:
    from weakclip.checkpoints import weights

    task = Classify(config)
    network: Any = task.load(weights.find(task.config, "last"))
    return lambda sample: network.cam(sample, config), {}


_SOURCES = {"clip": Source(_about_clip, _by_clip), "mctformer": Source(_about_mctformer, _by_mctformer)}
"""By `cam.source`."""


def choose(config: Config, clip: PromptedClip, labelled: Index) -> str:
    """The template that the set was begun with, or else the one with the least sharpness on some of its images."""
    first, *others = config.cam.prompts
    if not others:
        return first
    if (earlier := writing.noted(Path(config.data.train))) is not None:
        return earlier[PROMPT]
    from weakclip.data.stream import StoredSamples

    step = max(len(labelled.entries) // config.cam.prompt_images, 1)
    some = StoredSamples(labelled, labelled.entries[::step][: config.cam.prompt_images], config.data.workers)
    found = clip.sharpness(tqdm(some, "choosing the prompt", unit=" images", disable=None))
    print("sharpness:", ", ".join(f"{template!r} {value:.4f}" for template, value in found.items()), file=sys.stderr)
    return min(found, key=found.__getitem__)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m weakclip.cam", description="Make CAMs from image labels.")
    parser.add_argument("--shards", metavar="N|A:B", help="only these shards of cam.data")
    config, options = cli.parse_config(parser, arguments)
    run(config, options.shards)
    labelled = open_labelled(config)
    print(f"{config.data.train}: {written(config, labelled)} of {len(labelled.shards)} shards with CAMs")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
