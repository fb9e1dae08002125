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

from weakclip import cli, infer, masks
from weakclip import weights as stored
from weakclip.behind import Behind, map_in_threads
from weakclip.config import Config
from weakclip.data.shard import DecodedSample, Index
from weakclip.data.stream import StoredSamples, open_index, select_shards
from weakclip.finish import Unfinished, finish, mask_of
from weakclip.likely import NotFinite, likely
from weakclip.quality import Curves
from weakclip.tasks import Refine, Task


def say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def pseudo_mask(predictor: infer.Predictor, sample: DecodedSample, config: Config) -> np.ndarray:
    """uint8 H x W of class indices."""
    return mask_of(likely(predictor, sample, config, say), sample.image, config.pseudo.crf)


def write_masks(
    predictor: infer.Predictor, config: Config, samples: Iterable[DecodedSample], out: Path, curves: Curves, behind: Behind
) -> None:
    """KEY.png of every sample into `out`; a mask that is there already is left alone.

    The network runs here; CRFs and files are left to `behind`, which is handed likely classes alone, while the network goes on to
    the next image. On a CPU it is better to have as many images on their way as `behind` has processes, each on one core from the
    network to its files.
    """
    unlabelled: list[str] = []

    def missing() -> Iterator[DecodedSample]:
        for sample in samples:
            if masks.is_made(out, sample.key, config.pseudo.soft):
                continue
            if config.pseudo.restrict_to_labels and not sample.classes:
                unlabelled.append(sample.key)
            yield sample

    def unfinished(sample: DecodedSample) -> Unfinished:
        found = likely(predictor, sample, config, say)
        return Unfinished(replace(sample, mask=None), found, predictor.num_classes, config, out)

    if predictor.device.type == "cpu" and behind.processes > 1:
        made = map_in_threads(lambda sample: behind.run(finish, unfinished(sample)), behind.processes, missing())
    else:
        made = behind.map(finish, map(unfinished, missing()))
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
    masks.claim(out, config, weights)
    masks.remove_unfinished(out, entries)
    missing = masks.missing(out, entries, config.pseudo.soft)
    if not missing:
        return
    predictor = task.load(weights).predictor()
    samples = StoredSamples(index, missing, config.data.workers)
    board = task.run / "tensorboard" / out.name / ("" if part is None else f"shards-{part.replace(':', '-')}")
    curves = Curves(board, len(entries) - len(missing))
    try:
        with Behind(config.pseudo.processes) as behind:
            write_masks(predictor, config, tqdm(samples, "masks", unit=" images", disable=None), out, curves, behind)
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
