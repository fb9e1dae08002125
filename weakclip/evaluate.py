"""Score masks, seeds or CAMs against the ground truth in a shard set.

python -m weakclip.evaluate --config configs/voc.yaml [--what masks|seeds|cam] [--data DIR] [--shards 0:8] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from weakclip import cli, labels, masks
from weakclip.config import Config
from weakclip.data.shard import DecodedSample
from weakclip.data.stream import StoredSamples, cam_maps, open_index, seed_mask, select_shards
from weakclip.files import write_whole
from weakclip.metrics import Scores, confusion
from weakclip.seeds import cam_to_seed

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))


def score(samples: Iterable[DecodedSample], predict: Callable[[DecodedSample], np.ndarray], names: Sequence[str]) -> Scores:
    """IoU of `predict(sample)` against each sample's mask. Pixels that a seed ignores (255) count as background."""
    matrix_KK = np.zeros((len(names), len(names)), np.int64)
    for sample in tqdm(samples, "scoring", unit=" images", disable=None):
        prediction_HW = predict(sample)
        matrix_KK += confusion(truth(sample), np.where(prediction_HW == labels.IGNORE, 0, prediction_HW), len(names))
    return Scores.of(matrix_KK, names)


def truth(sample: DecodedSample) -> np.ndarray:
    if sample.mask is None:
        raise ValueError(f"{sample.key}: no ground-truth mask in the shard; build the shards with --masks")
    return sample.mask


def best_cam_threshold(samples: Iterable[DecodedSample], names: Sequence[str]) -> tuple[float, Scores]:
    """The single background threshold at which the CAMs score best, and that score."""
    K = len(names)
    matrices = np.zeros((len(THRESHOLDS), K, K), np.int64)
    for sample in tqdm(samples, "CAM thresholds", unit=" images", disable=None):
        maps_nHW = cam_maps(sample)
        for matrix_KK, threshold in zip(matrices, THRESHOLDS, strict=True):
            prediction_HW = cam_to_seed(maps_nHW, sample.cam.classes if sample.cam else (), threshold)
            matrix_KK += confusion(truth(sample), prediction_HW, K)
    return max(
        ((threshold, Scores.of(matrix_KK, names)) for threshold, matrix_KK in zip(THRESHOLDS, matrices, strict=True)),
        key=lambda pair: pair[1].miou,
    )


def run(config: Config, what: str, data: str, shards: str | None, folder: Path) -> Scores:
    """The stage: scores of "masks" (those in `folder`), "seeds" or "cam" on `shards` of the shard set `data`."""
    names = labels.class_names(config.classes)
    index = open_index(data, names, config.data)
    samples = StoredSamples(index, select_shards(index, shards), config.data.workers)
    if what == "cam":
        threshold, scores = best_cam_threshold(samples, names)
        print(f"best threshold {threshold}")
        return scores
    if what == "seeds":
        return score(samples, lambda sample: seed_mask(sample, config.seeds), names)
    return score(samples, lambda sample: masks.read(folder, sample.key), names)


def write(scores: Scores, made_by: dict[str, Any] | None, out: Path) -> None:
    """As JSON. made_by: what the scored masks say of themselves (masks.read_about)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps({**scores.as_dict(), "masks": made_by}, indent=1) + "\n")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m weakclip.evaluate", description="Score masks, seeds or CAMs.")
    parser.add_argument("--what", choices=("masks", "seeds", "cam"), default="masks", help="what is scored (default: masks)")
    parser.add_argument("--masks", metavar="DIR", help="folder of KEY.png (default: RUN/pseudo)")
    parser.add_argument("--data", metavar="DIR", help="shard set with ground-truth masks (default: data.train)")
    parser.add_argument("--shards", metavar="N|A:B", help="only these shards of it")
    parser.add_argument("--out", metavar="FILE", help="JSON to write (default: RUN/scores-WHAT.json)")
    config, options = cli.parse_config(parser, arguments)
    folder = Path(options.masks or Path(config.run) / "pseudo")
    scores = run(config, options.what, options.data or config.data.train, options.shards, folder)
    out = Path(options.out or Path(config.run) / f"scores-{options.what}.json")
    write(scores, masks.read_about(folder) if options.what == "masks" else None, out)
    print(scores.table())
    print(f"written: {out}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
