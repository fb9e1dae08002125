"""Write pseudo masks: probabilities over scales and mirror images, a dense CRF, one palette PNG an image.

python -m weakclip.pseudo --config configs/voc.yaml [--weights best] [--data DIR] [--shards 0:8] [--out DIR] [key=value ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from weakclip import cli, crf, infer, masks
from weakclip import weights as stored
from weakclip.config import Config
from weakclip.data.shard import DecodedSample, Entry, Index
from weakclip.data.stream import StoredSamples, open_index, select_shards
from weakclip.tasks import Refine, Task


def pseudo_mask(predictor: infer.Predictor, sample: DecodedSample, config: Config) -> np.ndarray:
    """uint8 H x W of class indices."""
    probs_KHW = infer.predict(predictor, sample.image, config.pseudo, config.data.scale).cpu().numpy()
    if config.pseudo.restrict_to_labels:
        absent = np.setdiff1d(np.arange(1, len(probs_KHW)), sample.classes)
        probs_KHW[absent] = 0
    if config.pseudo.crf is None:
        return probs_KHW.argmax(0).astype(np.uint8)
    return crf.refine(probs_KHW, sample.image, config.pseudo.crf)


def write_masks(predictor: infer.Predictor, config: Config, samples: Iterable[DecodedSample], out: Path) -> None:
    """KEY.png of every sample into `out`; a mask that is there already is left alone."""
    for sample in tqdm(samples, "pseudo masks", unit=" images", disable=None):
        path = out / f"{sample.key}.png"
        if not path.exists():
            masks.save(pseudo_mask(predictor, sample, config), path)


def run(config: Config, data: str, weights: Path, out: Path, shards: str | None = None) -> Path:
    """The stage: masks of the samples in `shards` of the shard set `data`, into `out`, which is returned."""
    task = Refine(config)
    index = open_index(data, task.names, config.data)
    write(task, index, select_shards(index, shards), weights, out)
    return out


def write(task: Task, index: Index, entries: Sequence[Entry], weights: Path, out: Path) -> None:
    """Masks of `entries` of a shard set by a task's network, into `out`; those that are there already are left alone."""
    masks.claim(out, task.config, weights)
    predictor = task.load(weights).predictor()
    write_masks(predictor, task.config, StoredSamples(index, masks.missing(out, entries), task.config.data.workers), out)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m weakclip.pseudo", description="Write pseudo masks.")
    parser.add_argument("--weights", default="best", metavar="best|last|FILE", help="which weights (default: best)")
    parser.add_argument("--data", metavar="DIR", help="shard set (default: data.train)")
    parser.add_argument("--shards", metavar="N|A:B", help="only these shards of it")
    parser.add_argument("--out", metavar="DIR", help="where the masks go (default: RUN/pseudo)")
    config, options = cli.parse_config(parser, arguments)
    weights = stored.find(config, options.weights)
    out = Path(options.out or Path(config.run) / "pseudo")
    print(f"masks: {run(config, options.data or config.data.train, weights, out, options.shards)}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
