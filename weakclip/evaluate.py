"""Score masks, seeds or CAMs against the ground truth in a shard set.

python -m weakclip.evaluate --config configs/voc.yaml [--what masks|seeds|cam|cam_crf] [--data DIR] [--shards 0:8] [key=value ...]
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from weakclip import cli, labels
from weakclip.config import Config, ConfigError, CrfConfig
from weakclip.data.index import Index, open_index, select_shards
from weakclip.data.sample import DecodedSample
from weakclip.data.stream import StoredSamples
from weakclip.evaluation import score_files
from weakclip.evaluation.boundary_iou import boundary_counts
from weakclip.evaluation.metrics import Counts, Scores, confusion, percent
from weakclip.evaluation.score_files import Scored
from weakclip.masks import mask_folder
from weakclip.masks.seeds import cam_maps, cam_to_seed, refined_cam, seed_mask, strongest
from weakclip.runtime.workers import WorkerPool

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))


@dataclass(frozen=True)
class CamScores(Scores):
    """Of CAMs at the background threshold with the highest mIoU."""

    threshold: float
    curve: Mapping[float, float]
    """The mIoU, a fraction, at each of THRESHOLDS."""

    def as_dict(self) -> dict[str, object]:
        curve = {f"{threshold:.2f}": percent(miou) for threshold, miou in self.curve.items()}
        return {**super().as_dict(), "threshold": self.threshold, "thresholds": curve}

    def curve_text(self) -> str:
        """A few lines; the best threshold is marked."""
        points = (f"{at:.2f}:{100 * miou:.2f}{'*' if at == self.threshold else ''}" for at, miou in self.curve.items())
        return textwrap.fill("  ".join(points), width=100)


def score(samples: Iterable[DecodedSample], predict: Callable[[DecodedSample], np.ndarray], names: Sequence[str]) -> Scores:
    """Of `predict(sample)` against each sample's mask. Pixels that a seed ignores (255) count as background."""
    return count(tqdm(samples, "scoring", unit=" images", disable=None), predict, len(names)).scores(names)


def count(samples: Iterable[DecodedSample], predict: Callable[[DecodedSample], np.ndarray], num_classes: int) -> Counts:
    """What `score` makes its scores of. The counts of several parts add up to those of the whole."""
    total = Counts.zero(num_classes)
    for sample in samples:
        prediction_HW = predict(sample)
        total += _count(sample, np.where(prediction_HW == labels.IGNORE, 0, prediction_HW), num_classes)
    return total


def _count(sample: DecodedSample, prediction_HW: np.ndarray, num_classes: int) -> Counts:
    found = truth(sample), prediction_HW, num_classes
    return Counts(confusion(*found), boundary_counts(*found))


def truth(sample: DecodedSample) -> np.ndarray:
    if sample.mask is None:
        raise ValueError(f"{sample.key}: no ground-truth mask in the shard; build the shards with --masks")
    return sample.mask


def best_cam_threshold(samples: Iterable[DecodedSample], names: Sequence[str]) -> CamScores:
    """The CAMs' scores at the single background threshold at which they are best. `samples` are gone through twice."""
    matrices_TKK = threshold_confusions(tqdm(samples, "CAM thresholds", unit=" images", disable=None), len(names))
    curve = {at: Scores.of(matrix_KK, names).miou for at, matrix_KK in zip(THRESHOLDS, matrices_TKK, strict=True)}
    best = max(curve, key=curve.__getitem__)
    found = score(samples, lambda sample: cam_to_seed(cam_maps(sample), sample.cam.classes if sample.cam else (), best), names)
    return CamScores(**vars(found), threshold=best, curve=curve)


def threshold_confusions(samples: Iterable[DecodedSample], num_classes: int) -> np.ndarray:
    """Confusion matrices of the CAMs at each of THRESHOLDS, int64 T x K x K, of one count over the pixels.

    What counts of a pixel are its true class, the strongest map's and how many thresholds that reaches: at those it is of its
    map's class, at the others background.
    """
    K, T = num_classes, len(THRESHOLDS)
    thresholds_T = np.array(THRESHOLDS, np.float32)
    reached_TKK = np.zeros((T + 1, K, K), np.int64)
    for sample in samples:
        class_HW, value_HW = strongest(cam_maps(sample), sample.cam.classes if sample.cam else ())
        true_HW = truth(sample)
        valid_HW = true_HW != labels.IGNORE
        reached = thresholds_T.searchsorted(value_HW[valid_HW], side="right")
        pixels = (reached * K + true_HW[valid_HW]) * K + class_HW[valid_HW]
        reached_TKK += np.bincount(pixels, minlength=reached_TKK.size).reshape(reached_TKK.shape)
    kept_TKK = reached_TKK[:0:-1].cumsum(0)[::-1]  # of each threshold, those that reach it or a higher one
    matrices_TKK = kept_TKK.copy()
    matrices_TKK[:, :, 0] += (reached_TKK.sum(0) - kept_TKK).sum(2)
    return matrices_TKK


def cam_crf_counts(
    samples: Iterable[DecodedSample], threshold: float, settings: Sequence[CrfConfig], num_classes: int, processes: int | None
) -> list[Counts]:
    """Of the CAMs at a background threshold after a dense CRF, in each of its settings. processes: `pseudo.processes`."""
    total = [Counts.zero(num_classes)] * len(settings)
    with WorkerPool(processes) as pool:
        found = pool.map(partial(_cam_crf_counts, threshold=threshold, settings=settings, num_classes=num_classes), samples)
        for counts in tqdm(found, "CAM + CRF", unit=" images", disable=None):
            total = [whole + part for whole, part in zip(total, counts, strict=True)]
    return total


def _cam_crf_counts(sample: DecodedSample, threshold: float, settings: Sequence[CrfConfig], num_classes: int) -> list[Counts]:
    """Of one image."""
    maps_nHW, classes = cam_maps(sample), sample.cam.classes if sample.cam else ()
    return [_count(sample, refined_cam(maps_nHW, classes, sample.image, threshold, crf), num_classes) for crf in settings]


def run(config: Config, what: str, data: str, shards: str | None, folder: Path) -> Scores:
    """Scores of "masks" (those in `folder`), "seeds", "cam" or "cam_crf" on `shards` of the shard set `data`."""
    names = labels.class_names(config.classes)
    index = open_index(data, names, config.data)
    samples = StoredSamples(index, select_shards(index, shards), config.data.workers)
    if what in ("cam", "cam_crf"):
        if what == "cam_crf" and config.pseudo.crf is None:
            raise ConfigError("pseudo.crf is null: it is the setting in which --what cam_crf takes the CRF")
        found = best_cam_threshold(samples, names)
        print(f"best threshold {found.threshold}; threshold:mIoU (%):\n{found.curve_text()}")
        if what == "cam_crf" and config.pseudo.crf:
            settings = [config.pseudo.crf]
            return cam_crf_counts(samples, found.threshold, settings, len(names), config.pseudo.processes)[0].scores(names)
        return found
    if what == "seeds":
        return score(samples, lambda sample: seed_mask(sample, config.seeds), names)
    return score(samples, lambda sample: mask_folder.read(folder, sample.key), names)


def run_part(config: Config, part: str | None) -> None:
    """The stage: score the run's masks on the training shards "A:B", shard by shard; what is counted already is left alone.

    Who finds that all shards are counted adds them up.
    """
    index = open_index(config.data.train, labels.class_names(config.classes), config.data)
    score_shards(config, index, part, Scored.pseudo(Path(config.run)))


def score_shards(config: Config, index: Index, part: str | None, place: Scored) -> None:
    """Score masks on the shards "A:B" of a set, as `run_part` does."""
    shards = groupby(select_shards(index, part), lambda entry: entry.shard)
    for shard, entries in tqdm([(shard, list(entries)) for shard, entries in shards], "scoring", unit=" shards", disable=None):
        if place.counts(shard) is None:
            samples = StoredSamples(index, entries, config.data.workers)
            found = count(samples, lambda sample: mask_folder.read(place.masks, sample.key), len(index.classes))
            place.write_counts(shard, found)
    if (whole := place.add_up(index)) is not None:
        print(whole.table())


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m weakclip.evaluate", description="Score masks, seeds or CAMs.")
    parser.add_argument(
        "--what", choices=("masks", "seeds", "cam", "cam_crf"), default="masks", help="what is scored (default: masks)"
    )
    parser.add_argument("--masks", metavar="DIR", help="folder of KEY.png (default: RUN/pseudo)")
    parser.add_argument("--data", metavar="DIR", help="shard set with ground-truth masks (default: data.train)")
    parser.add_argument("--shards", metavar="N|A:B", help="only these shards of it")
    parser.add_argument("--out", metavar="FILE", help="JSON to write (default: RUN/scores-WHAT.json)")
    config, options = cli.parse_config(parser, arguments)
    folder = Path(options.masks or Path(config.run) / "pseudo")
    found = run(config, options.what, options.data or config.data.train, options.shards, folder)
    out = Path(options.out or Path(config.run) / f"scores-{options.what}.json")
    score_files.write(found, mask_folder.read_about(folder) if options.what == "masks" else None, out)
    print(found.table())
    print(f"written: {out}")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
