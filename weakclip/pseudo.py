"""Write pseudo masks: probabilities over scales and mirror images, a dense CRF, one palette PNG an image.

python -m weakclip.pseudo --config configs/voc.yaml [--weights best] [--data DIR] [--shards 0:8] [--out DIR] [key=value ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from weakclip import cli
from weakclip.checkpoints import weights as stored
from weakclip.config import Config
from weakclip.data.index import Index, open_index, select_shards
from weakclip.data.sample import DecodedSample
from weakclip.data.stream import StoredSamples
from weakclip.masks import mask_folder, sliding_window
from weakclip.masks.fallback import NotFinite, likely
from weakclip.masks.statistics import Curves
from weakclip.masks.writing import Unfinished, finish, mask_of
from weakclip.runtime.workers import WorkerPool, map_in_threads
from weakclip.training.jobs import Refine, Task


def say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def pseudo_mask(predictor: sliding_window.Predictor, sample: DecodedSample, config: Config) -> np.ndarray:
    """uint8 H x W of class indices."""
    return mask_of(likely(predictor, sample, config, say), sample.image, config.pseudo.crf)


def write_masks(
    predictor: sliding_window.Predictor,
    config: Config,
    samples: Iterable[DecodedSample],
    out: Path,
    curves: Curves,
    workers: WorkerPool,
) -> None:
    """KEY.png of every sample into `out`; a mask that is there already is left alone.

    The network runs here. `workers` receive the likely classes alone, run the CRF and write the files, while the network
    computes the next image. On a CPU as many images are in flight as there are workers, each on one core from the network to
    its files.
    """
    unlabelled: list[str] = []

    def missing() -> Iterator[DecodedSample]:
        for sample in samples:
            if mask_folder.is_made(out, sample.key, config.pseudo.soft):
                continue
            if config.pseudo.restrict_to_labels and not sample.classes:
                unlabelled.append(sample.key)
            yield sample

    def unfinished(sample: DecodedSample) -> Unfinished:
        found = likely(predictor, sample, config, say)
        return Unfinished(replace(sample, mask=None), found, predictor.num_classes, config, out)

    if predictor.device.type == "cpu" and workers.processes > 1:
        made = map_in_threads(lambda sample: workers.run(finish, unfinished(sample)), workers.processes, missing())
    else:
        made = workers.map(finish, map(unfinished, missing()))
    for quality in made:
        curves.add(quality)
    if unlabelled:
        some = ", ".join(unlabelled[:10]) + (", ..." if len(unlabelled) > 10 else "")
        say(f"warning: {len(unlabelled)} images have no label, so their masks are background alone: {some}")


def run(config: Config, data: str, weights: Path, out: Path, shards: str | None = None) -> Path:
    """The stage: masks of the samples in `shards` of the shard set `data`, into `out`, which is returned."""
    task = Refine(config)
    write(task, open_index(data, task.names, config.data), shards, weights, out)
    return out


def write(task: Task, index: Index, part: str | None, weights: Path, out: Path) -> None:
    """Masks of the shards "A:B" by a task's network, into `out`; those that are there already are left alone."""
    config, entries = task.config, select_shards(index, part)
    mask_folder.claim(out, config, weights)
    mask_folder.remove_unfinished(out, entries)
    missing = mask_folder.missing(out, entries, config.pseudo.soft)
    if not missing:
        return
    predictor = task.load(weights).predictor()
    samples = StoredSamples(index, missing, config.data.workers)
    board = task.run / "tensorboard" / out.name / ("" if part is None else f"shards-{part.replace(':', '-')}")
    curves = Curves(board, len(entries) - len(missing))
    try:
        with WorkerPool(config.pseudo.processes) as workers:
            write_masks(predictor, config, tqdm(samples, "masks", unit=" images", disable=None), out, curves, workers)
    except NotFinite as error:
        raise ValueError(f"{weights}: {error}") from None
    finally:
        say(curves.close())


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
