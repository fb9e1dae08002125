"""Measure pseudo masks per second on all cores or one GPU of this machine: our pipeline against the released one.

    python benchmarks/pseudo.py --config configs/coco_mini.yaml --weights RUN/weights/last.safetensors --data SHARDS \
        'pseudo.scales=[0.5,0.75,1.0,1.25,1.5,1.75]'

The released pipeline (hustvl/WeakCLIP, tools/test.py and tools/make_crf.py) processes one crop at a time and runs the text tower
for each. Logits of all classes are padded to the scaled image and added, resized to the image's size, and put through a softmax.
It writes a file of float32 probabilities of the occurring classes for each image. Afterwards another command reads the files for
the CRF, with one process per core. "released, text once" runs the text tower only once; its CRFs are not run again.

All pipelines process the same images with the same weights and alternate round by round. The result is the median wall time of a
round. Processes are started before the clock. Our pipeline is that of `python -m weakclip.pseudo`, without compilation.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weakclip import cli, labels
from weakclip.config import Config
from weakclip.data.index import open_index
from weakclip.data.reading import load
from weakclip.data.sample import DecodedSample
from weakclip.data.transforms import resize_image
from weakclip.masks import crf, mask_folder, sliding_window
from weakclip.masks.curves import Curves
from weakclip.masks.mask_folder import MaskSettings
from weakclip.masks.writing import write_masks
from weakclip.models.load import load_weakclip
from weakclip.models.weakclip import WeakCLIP
from weakclip.runtime.workers import WorkerPool, cores

# ------------------------------------------------------------------------------------------------ the released pipeline


def released_probabilities(predictor: sliding_window.Predictor, image_HW3: np.ndarray, config: Config) -> Tensor:
    """Return the mean probabilities, float32 K x H x W."""
    total_1KHW = torch.zeros((), device=predictor.device)
    views = sliding_window.views(sliding_window.scaled_sizes(image_HW3, config.pseudo, config.data.scale), config.pseudo)
    for view in views:
        x_HW3 = torch.from_numpy(resize_image(image_HW3, view.size)).to(predictor.device)
        x_13HW = predictor.normalisation.apply(x_HW3.permute(2, 0, 1).float())[None]
        logits_1KHW = released_slide(predictor, x_13HW.flip(3) if view.flipped else x_13HW, config)
        probs_1KHW = F.interpolate(logits_1KHW, size=image_HW3.shape[:2], mode="bilinear").softmax(1)
        total_1KHW = total_1KHW + (probs_1KHW.flip(3) if view.flipped else probs_1KHW)
    return (total_1KHW / len(views))[0]


def released_slide(predictor: sliding_window.Predictor, x_13HW: Tensor, config: Config) -> Tensor:
    """Return the logits at the size of the scaled image, float32 1 x K x H x W."""
    H, W = x_13HW.shape[2:]
    window, stride = config.pseudo.window, config.pseudo.stride
    sum_1KHW = torch.zeros(1, predictor.num_classes, H, W, device=predictor.device)
    count_HW = torch.zeros(H, W, device=predictor.device)
    for y in sliding_window.starts(H, window, stride):
        for x in sliding_window.starts(W, window, stride):
            crop = x_13HW[:, :, y : y + window, x : x + window]
            h, w = crop.shape[2:]
            logits = F.interpolate(predictor.logits(crop), size=(h, w), mode="bilinear")
            sum_1KHW += F.pad(logits, (x, W - x - w, y, H - y - h))
            count_HW[y : y + h, x : x + w] += 1
    return sum_1KHW / count_HW


def released_first(predictor: sliding_window.Predictor, samples: Sequence[DecodedSample], config: Config, out: Path) -> None:
    """Run the first command, which writes files of probabilities."""
    for sample in samples:
        with torch.inference_mode():
            probs_KHW = released_probabilities(predictor, sample.image, config)
        prediction_HW = probs_KHW.argmax(0).cpu().numpy()
        classes_n = np.unique(prediction_HW)
        found = {"prob": probs_KHW.cpu().numpy()[classes_n], "keys": classes_n, "pred": prediction_HW[None]}
        np.save(out / f"{sample.name}.npy", found, allow_pickle=True)  # type: ignore[arg-type]


def released_crf(sample: DecodedSample, config: Config, out: Path) -> None:
    """Run the second command, the CRF, for one image."""
    found = np.load(out / f"{sample.name}.npy", allow_pickle=True).item()
    probs_nHW, classes_n = found["prob"], found["keys"]
    if len(classes_n) > 1 and config.pseudo.crf is not None:
        probs_nHW = crf.dense_crf(probs_nHW, sample.image, config.pseudo.crf)
    mask_folder.save(classes_n[probs_nHW.argmax(0)].astype(np.uint8), out / f"{sample.name}.png")


# ------------------------------------------------------------------------------------------------------------ measurement


def same(first: Path, second: Path, keys: Sequence[str]) -> float:
    """Return the share of pixels on which two folders of masks agree."""
    pairs = [(mask_folder.read(first, key).ravel(), mask_folder.read(second, key).ravel()) for key in keys]
    return float(np.mean(np.concatenate([a == b for a, b in pairs])))


def timed(work: Callable[..., object], *arguments: Any) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


class Seconds(NamedTuple):
    """Wall times of one round in seconds."""

    released_first: float
    released_crf: float
    text_once: float
    ours: float


def ours(
    predictor: sliding_window.Predictor,
    samples: Sequence[DecodedSample],
    config: Config,
    out: Path,
    curves: Curves,
    workers: WorkerPool,
) -> None:
    write_masks(predictor, MaskSettings.of(config), samples, out, curves, workers)


def one_round(
    model: WeakCLIP, samples: Sequence[DecodedSample], config: Config, folder: Path, pool: Executor, workers: WorkerPool
) -> Seconds:
    """Run one round, writing masks to FOLDER/released and FOLDER/ours."""
    theirs, mine = folder / "released", folder / "ours"
    theirs.mkdir(parents=True)
    mine.mkdir()
    once = model.predictor()
    each = once._replace(logits=lambda x_B3HW: model(x_B3HW).logits_BKhw)
    return Seconds(
        timed(released_first, each, samples, config, theirs),
        timed(lambda: [*pool.map(released_crf, samples, repeat(config), repeat(theirs))]),
        timed(released_first, once, samples, config, theirs),
        timed(ours, once, samples, config, mine, Curves(folder / "curves", 0), workers),
    )


def compare(model: WeakCLIP, samples: Sequence[DecodedSample], config: Config, rounds: int, folder: Path) -> dict[str, object]:
    """Return images per second of the median round, and the share of pixels on which the masks agree."""
    count, found = cores(), []
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool, WorkerPool(count) as workers:
        one_round(model, samples[:count], config, folder / "start", pool, workers)
        for turn in range(rounds):
            found.append(one_round(model, samples, config, folder / str(turn), pool, workers))
            print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in found[-1]._asdict().items()), file=sys.stderr)
    times = {
        "released": [each.released_first + each.released_crf for each in found],
        "released, text once": [each.text_once + each.released_crf for each in found],
        "ours": [each.ours for each in found],
    }
    rates = {name: len(samples) / float(np.median(seconds)) for name, seconds in times.items()}
    return {
        "images": len(samples),
        "cores": count,
        "images_per_second": rates,
        "ratio": {name: rates["ours"] / rates[name] for name in rates if name != "ours"},
        "same_percent": 100 * same(folder / "0/released", folder / "0/ours", [sample.name for sample in samples]),
    }


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--weights", required=True, type=Path, metavar="FILE", help="weights of a trained run of the recipe")
    parser.add_argument("--data", required=True, metavar="SHARDS")
    parser.add_argument("--images", type=int, default=6, help="number of images, from the first")
    parser.add_argument("--rounds", type=int, default=3)
    config, options = cli.parse_config(parser, arguments)
    torch.set_num_threads(cores())
    model = load_weakclip(config, options.weights).to(options.device)
    model.cast_frozen()
    index = open_index(options.data, labels.class_names(config.classes))
    samples = [replace(load(index, entry), cam=None, seed=None, mask=None) for entry in index.entries[: options.images]]
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(model, samples, config, options.rounds, Path(folder)), indent=2))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
