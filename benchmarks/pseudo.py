"""Pseudo masks a second and core, ours against the released code's order of work.

    python benchmarks/pseudo.py --config configs/coco_mini.yaml --weights RUN/weights/last.safetensors --data SHARDS \
        'pseudo.scales=[0.5,0.75,1.0,1.25,1.5,1.75]'

The released order of work (hustvl/WeakCLIP, tools/test.py and tools/make_crf.py): one crop at a time, for each of which the text
tower runs again; logits of all classes padded to the scaled image and added, resized to the image's size, softmax; a file of
float32 probabilities of the occurring classes for each image, which another command reads for the CRF. "released, text once"
leaves out what the text tower costs.

Both do the same images in turns, image by image, on one thread, and what counts is the time of the processor, which others on
the machine disturb least. That the released CRFs use several processes, and ours overlap with the network, changes the work of
neither: on so many cores each is that many times as fast at best.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weakclip import cli, crf, infer, labels, masks
from weakclip import weights as stored
from weakclip.config import Config
from weakclip.data.shard import DecodedSample
from weakclip.data.stream import load, open_index
from weakclip.data.transforms import resize_image
from weakclip.finish import Unfinished, finish
from weakclip.likely import likely
from weakclip.model import WeakCLIP

# ------------------------------------------------------------------------------------------------------- the released way


def released_probabilities(predictor: infer.Predictor, image_HW3: np.ndarray, config: Config) -> Tensor:
    """Mean probabilities, K x H x W."""
    total_1KHW, views = (
        torch.zeros(()),
        infer.views(infer.scaled_sizes(image_HW3, config.pseudo, config.data.scale), config.pseudo),
    )
    for view in views:
        x_HW3 = torch.from_numpy(resize_image(image_HW3, view.size))
        x_13HW = predictor.normalisation.apply(x_HW3.permute(2, 0, 1).float())[None]
        logits_1KHW = released_slide(predictor, x_13HW.flip(3) if view.mirrored else x_13HW, config)
        probs_1KHW = F.interpolate(logits_1KHW, size=image_HW3.shape[:2], mode="bilinear").softmax(1)
        total_1KHW = total_1KHW + (probs_1KHW.flip(3) if view.mirrored else probs_1KHW)
    return (total_1KHW / len(views))[0]


def released_slide(predictor: infer.Predictor, x_13HW: Tensor, config: Config) -> Tensor:
    """Logits at the size of the scaled image, 1 x K x H x W."""
    H, W = x_13HW.shape[2:]
    window, stride = config.pseudo.window, config.pseudo.stride
    sum_1KHW, count_HW = torch.zeros(1, predictor.num_classes, H, W), torch.zeros(H, W)
    for y in infer.starts(H, window, stride):
        for x in infer.starts(W, window, stride):
            crop = x_13HW[:, :, y : y + window, x : x + window]
            h, w = crop.shape[2:]
            logits = F.interpolate(predictor.logits(crop), size=(h, w), mode="bilinear")
            sum_1KHW += F.pad(logits, (x, W - x - w, y, H - y - h))
            count_HW[y : y + h, x : x + w] += 1
    return sum_1KHW / count_HW


def released_crf(file: Path, image_HW3: np.ndarray, config: Config, out: Path) -> None:
    """The second command, for one image."""
    found = np.load(file, allow_pickle=True).item()
    probs_nHW, classes_n = found["prob"], found["keys"]
    if len(classes_n) > 1 and config.pseudo.crf is not None:
        probs_nHW = crf.dense_crf(probs_nHW, image_HW3, config.pseudo.crf)
    masks.save(classes_n[probs_nHW.argmax(0)].astype(np.uint8), out)


def released(predictor: infer.Predictor, sample: DecodedSample, config: Config, out: Path) -> None:
    with torch.inference_mode():
        probs_KHW = released_probabilities(predictor, sample.image, config)
    prediction_HW = probs_KHW.argmax(0).numpy()
    classes_n = np.unique(prediction_HW)
    found = {"prob": probs_KHW.numpy()[classes_n], "keys": classes_n, "pred": prediction_HW[None]}
    np.save(out / f"{sample.key}.npy", found, allow_pickle=True)  # type: ignore[arg-type]
    released_crf(out / f"{sample.key}.npy", sample.image, config, out / f"{sample.key}.png")


# ------------------------------------------------------------------------------------------------------------ measurement


def ours(predictor: infer.Predictor, sample: DecodedSample, config: Config, out: Path) -> None:
    finish(Unfinished(sample, likely(predictor, sample, config, print), predictor.num_classes, config, out))


def same(first: Path, second: Path, keys: Sequence[str]) -> float:
    """Share of pixels on which two folders of masks agree."""
    pairs = [(masks.read(first, key).ravel(), masks.read(second, key).ravel()) for key in keys]
    return float(np.mean(np.concatenate([a == b for a, b in pairs])))


def compare(model: WeakCLIP, samples: Sequence[DecodedSample], config: Config, rounds: int, folder: Path) -> dict[str, object]:
    """Images a second and core, of the medians over rounds, and how alike the masks are."""
    once = model.predictor()
    each = once._replace(logits=lambda x_B3HW: model(x_B3HW).logits_BKhw)
    contestants = {"released": (released, each), "released, text once": (released, once), "ours": (ours, once)}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for sample in [*samples] * rounds:
        for name, (work, predictor) in contestants.items():
            (folder / name).mkdir(exist_ok=True)
            start = time.process_time()
            work(predictor, sample, config, folder / name)
            seconds[name].append(time.process_time() - start)
    medians = {name: np.median(np.reshape(times, (rounds, -1)), axis=0) for name, times in seconds.items()}
    rates = {name: 1 / float(times.mean()) for name, times in medians.items()}
    return {
        "images": len(samples),
        "images_per_second_and_core": rates,
        "ratio": {name: rates["ours"] / rates[name] for name in rates if name != "ours"},
        "same_percent": 100 * same(folder / "released", folder / "ours", [sample.key for sample in samples]),
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, type=Path, metavar="FILE", help="of a trained run of the recipe")
    parser.add_argument("--data", required=True, metavar="SHARDS")
    parser.add_argument("--images", type=int, default=8, help="so many of the first ones")
    parser.add_argument("--rounds", type=int, default=3)
    config, options = cli.parse_config(parser, arguments)
    torch.set_num_threads(1)
    model = stored.load_model(config, options.weights)
    index = open_index(options.data, labels.class_names(config.classes))
    samples = [replace(load(index, entry), cam=None, seed=None, mask=None) for entry in index.entries[: options.images]]
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(model, samples, config, options.rounds, Path(folder)), indent=2))


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
