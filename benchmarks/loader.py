"""Measure augmented training samples per second on one core: our pipeline against the published one.

    python benchmarks/loader.py --images COCO --scaling --start --json loader.json

COCO holds train2014/ and annotations/instances_train2014.json; the ground truth serves as seeds. The published pipeline (mmseg's)
is reimplemented with OpenCV: decode, resize the whole image, crop, distort, normalise, pad. Both process the same images with the
same random draws and alternate batch by batch. The reimplementation counts the classes in a crop with a histogram, which favours
it: np.unique, which mmseg uses, takes longer than everything else with numpy 2.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from weakclip import cli
from weakclip.config import AugmentConfig, Config
from weakclip.data.index import Index, open_index
from weakclip.data.photometric import IMAGENET, distort
from weakclip.data.plan import generator
from weakclip.data.reading import read_entry
from weakclip.data.sample import Sample
from weakclip.data.stream import Source, StreamSettings, TrainingSamples, collate, training_batches
from weakclip.data.transforms import draw_photometric, scaled_size
from weakclip.datasets.coco import coco_items
from weakclip.datasets.items import Item, load_item
from weakclip.datasets.writing import build_shards
from weakclip.labels import COCO
from weakclip.masks.seeds import seed_mask
from weakclip.runtime.command_line import output_file

CONTESTANTS = ("published", "ours", "ours, distorted and normalised on the CPU")
RANKS = 4  # of the published recipe


# ------------------------------------------------------------------------------------------------- the published pipeline


def published(stem: Path, rng: np.random.Generator, config: AugmentConfig, scale: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Apply mmseg's transforms. Returns the normalised image, float32 c x c x 3, and the seed, uint8 c x c."""
    image_HW3 = cv2.imdecode(np.fromfile(stem.with_suffix(".jpg"), np.uint8), cv2.IMREAD_COLOR)
    seed_HW = np.array(Image.open(io.BytesIO(stem.with_suffix(".png").read_bytes())))  # mmseg also reads masks with Pillow
    size = scaled_size(*seed_HW.shape, scale, rng.uniform(config.ratio[0], config.ratio[1]))
    image_HW3 = cv2.resize(image_HW3, size[::-1], interpolation=cv2.INTER_LINEAR)
    seed_HW = cv2.resize(seed_HW, size[::-1], interpolation=cv2.INTER_NEAREST)
    for _ in range(10):
        top, left = (int(rng.integers(max(side - config.crop, 0) + 1)) for side in size)
        window = slice(top, top + config.crop), slice(left, left + config.crop)
        counts = cv2.calcHist([seed_HW[window]], [0], None, [255], [0, 255])
        if (counts > 0).sum() > 1 and counts.max() < config.max_class_share * counts.sum():
            break
    image_HW3, seed_HW = image_HW3[window], seed_HW[window]
    if rng.random() < config.flip:
        image_HW3, seed_HW = cv2.flip(image_HW3, 1), cv2.flip(seed_HW, 1)
    image_HW3 = normalised(distorted(image_HW3, draw_photometric(rng)))
    border = 0, config.crop - seed_HW.shape[0], 0, config.crop - seed_HW.shape[1], cv2.BORDER_CONSTANT
    return cv2.copyMakeBorder(image_HW3, *border, value=0), cv2.copyMakeBorder(seed_HW, *border, value=255)


def distorted(bgr_HW3: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Apply mmseg's PhotoMetricDistortion, 8-bit after each step."""
    brightness, contrast, saturation, hue, last = draws.tolist()
    if brightness:
        bgr_HW3 = converted(bgr_HW3, beta=brightness)
    if contrast and not last:
        bgr_HW3 = converted(bgr_HW3, contrast)
    if saturation:
        hsv_HW3 = cv2.cvtColor(bgr_HW3, cv2.COLOR_BGR2HSV)
        hsv_HW3[..., 1] = converted(hsv_HW3[..., 1], saturation)
        bgr_HW3 = cv2.cvtColor(hsv_HW3, cv2.COLOR_HSV2BGR)
    if hue:
        hsv_HW3 = cv2.cvtColor(bgr_HW3, cv2.COLOR_BGR2HSV)
        hsv_HW3[..., 0] = (hsv_HW3[..., 0].astype(int) + int(hue) // 2) % 180
        bgr_HW3 = cv2.cvtColor(hsv_HW3, cv2.COLOR_HSV2BGR)
    return converted(bgr_HW3, contrast) if contrast and last else bgr_HW3


def converted(pixels: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
    return np.clip(pixels.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)


def normalised(bgr_HW3: np.ndarray) -> np.ndarray:
    """Normalise an image as mmcv's imnormalize does."""
    rgb_HW3 = cv2.cvtColor(bgr_HW3.astype(np.float32), cv2.COLOR_BGR2RGB)
    cv2.subtract(rgb_HW3, np.array([IMAGENET.mean]), rgb_HW3)
    return cv2.multiply(rgb_HW3, 1 / np.array([IMAGENET.std]), rgb_HW3)


# ------------------------------------------------------------------------------------------------------------ measurement


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rates(index: Index, files: Path, config: Config, rounds: int) -> dict[str, float]:
    """Return median samples per second. A round is an epoch, in which two contestants alternate batch by batch."""
    images, batch = len(index.entries), config.train.batch
    source = Source(index, (config.seed, 0), config.data.shuffle_window)
    loader = iter(TrainingSamples((index,), StreamSettings.of(config), 0, 0, 1, partial(seed_mask, config=config.seeds)))

    def publish(positions: Sequence[int]) -> None:
        for position in positions:
            candidate = next(source.candidates(position))
            published(files / candidate.entry.key, generator(*candidate.key), config.augment, config.data.scale)

    def load(positions: Sequence[int]) -> None:
        deque(islice(loader, len(positions)), maxlen=0)

    def load_and_distort(positions: Sequence[int]) -> None:
        made = collate(list(islice(loader, len(positions))))
        IMAGENET.apply(distort(made.images, made.photometric))

    def rate_in_turns(*works: Callable[[Sequence[int]], None]) -> list[float]:
        taken = np.zeros((rounds + 1, len(works)))
        for epoch, times in enumerate(taken):
            for start in range(0, images, batch):
                for number, work in enumerate(works):
                    positions = range(epoch * images + start, epoch * images + min(start + batch, images))
                    times[number] += seconds(partial(work, positions))
        return (images / np.median(taken[1:], axis=0)).tolist()

    # The last one runs alone, because the allocator keeps the memory of its large arrays, which would speed up the others.
    return dict(zip(CONTESTANTS, [*rate_in_turns(publish, load), *rate_in_turns(load_and_distort)], strict=True))


def scaling(path: Path, config: Config, rounds: int) -> dict[str, float]:
    """Return median samples per second of the real loader with one and with two loader processes."""
    taken: dict[int, list[float]] = {1: [], 2: []}
    batches = 40
    for workers, times in [*taken.items()] * rounds:
        config.data.workers = workers
        stream = training_batches(open_index(str(path), COCO), StreamSettings.of(config), partial(seed_mask, config=config.seeds))
        [*islice(stream, 2 * workers + 2)]  # prefetched batches are not timed
        times.append(seconds(lambda stream=stream: [*islice(stream, batches)]))
        stream.close()
    return {f"{workers} workers": batches * config.train.batch / statistics.median(times) for workers, times in taken.items()}


def starts(path: Path, config: Config, rounds: int) -> dict[str, float]:
    """Return median seconds from opening the index to the first batch of a run of 4 ranks, at the start and resumed."""
    config.data.workers = 1
    taken: dict[int, list[float]] = {0: [], 30_000: []}

    def first(step: int) -> None:
        stream = training_batches(
            open_index(str(path), COCO),
            StreamSettings.of(config),
            partial(seed_mask, config=config.seeds),
            step * config.train.batch * RANKS,
            0,
            RANKS,
        )
        next(stream)
        stream.close()

    for step, times in [*taken.items()] * rounds:
        times.append(seconds(partial(first, step)))
    return {f"step {step}": statistics.median(times) for step, times in taken.items()}


def waiting(path: Path, config: Config, rate: float, batches: int = 200) -> float:
    """Return for how much of its time (%) a training of `rate` samples per second waits for `data.workers` loader processes."""
    stream = training_batches(open_index(str(path), COCO), StreamSettings.of(config), partial(seed_mask, config=config.seeds))
    [*islice(stream, 2 * config.data.workers + 2)]
    waited, begin = 0.0, time.perf_counter()
    for _ in range(batches):
        waited += seconds(partial(next, stream))
        time.sleep(config.train.batch / rate)  # the step
    total = time.perf_counter() - begin
    stream.close()
    return 100 * waited / total


# ---------------------------------------------------------------------------------------------------------------- the set


def load_with_seed(item: Item) -> Sample:
    sample = load_item(item, range(len(COCO)))
    return replace(sample, seed=sample.mask, mask=None)


def unpack(index: Index, folder: Path) -> None:
    """Write KEY.jpg and KEY.png, image and seed, of each sample."""
    folder.mkdir()
    for entry in index.entries:
        parts = read_entry(index, entry)
        (folder / f"{entry.key}.jpg").write_bytes(parts["jpg"])
        (folder / f"{entry.key}.png").write_bytes(parts["seed.png"])


def build(images: Path, out: Path) -> Index:
    items = coco_items(images / "train2014", images / "annotations" / "instances_train2014.json", COCO, with_masks=True).items
    return build_shards([item for item in items if item.classes], load_with_seed, out, COCO, samples_per_shard=16)


def main(arguments: Sequence[str]) -> None:
    repository = Path(__file__).resolve().parents[1]
    beside = repository.parent / "shared" / "data" / "coco_mini"
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=beside, help="COCO 2014's directory")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, after one warm-up")
    parser.add_argument("--scaling", action="store_true", help="also time the loader with one and with two processes")
    parser.add_argument("--start", action="store_true", help="also time the first batch at step 0 and at step 30,000")
    parser.add_argument(
        "--consume", type=float, metavar="RATE", help="also time the waits of a training of RATE samples per second"
    )
    parser.add_argument("--json", type=output_file, help="file to write the results to")
    config, options = cli.parse_config(parser, ["--config", str(repository / "configs" / "coco.yaml"), *arguments])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        index = build(options.images, Path(folder) / "shards")
        unpack(index, Path(folder) / "files")
        found = rates(index, Path(folder) / "files", config, options.rounds)
        report = {"ratio": found["ours"] / found["published"], "samples_per_second": found}
        if options.scaling:
            several = scaling(index.root, config, 5)
            report["scaling"] = {"ratio": several["2 workers"] / several["1 workers"], "samples_per_second": several}
        if options.start:
            report["start_seconds"] = starts(index.root, config, 5)
        if options.consume:
            report["waiting_percent"] = waiting(index.root, config, options.consume)
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
