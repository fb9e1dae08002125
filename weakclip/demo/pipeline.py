"""The whole pipeline on the synthetic world: pictures -> CAMs -> shards -> training -> pseudo masks -> scores."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from weakclip import crf, labels, masks, pictures, pseudo, weights
from weakclip import run as runs
from weakclip.config import Config, CrfConfig
from weakclip.data.shard import DecodedSample, Index, Sample
from weakclip.data.stream import StoredSamples, cam_maps, open_index, seed_mask
from weakclip.data.writing import build_shards
from weakclip.demo import cam, world
from weakclip.engine import World
from weakclip.evaluate import best_cam_threshold, score, truth
from weakclip.files import write_whole
from weakclip.seeds import cam_to_probabilities
from weakclip.tasks import Refine
from weakclip.train import train

UNSEEN = 500_000
"""Index of the first picture that no training step sees."""

ROWS = {
    "cam": "CAM, best single threshold",
    "cam_crf": "CAM + dense CRF",
    "weakclip": "WeakCLIP",
    "weakclip_crf": "WeakCLIP + dense CRF",
    "ceiling": "WeakCLIP trained on exact masks",
    "ceiling_crf": "WeakCLIP trained on exact masks + dense CRF",
    "unseen_weakclip": "WeakCLIP, unseen images",
    "unseen_weakclip_crf": "WeakCLIP + dense CRF, unseen images",
    "unseen_ceiling": "WeakCLIP trained on exact masks, unseen images",
    "unseen_ceiling_crf": "WeakCLIP trained on exact masks + dense CRF, unseen images",
}


def run(config: Config) -> dict[str, float]:
    """Everything, into the run directory; what an interrupted run finished is not done again. Returns mIoU (%) by name."""
    task = Refine(config)
    folder = runs.claim(config, task.fixed, resume=True)
    seen, unseen = make_shards(config, Path(config.data.train), folder / "shards" / "unseen")
    _say(f"training WeakCLIP, {config.train.steps} steps")
    train(task, World.join(), resume=True)
    _say("scoring the CAMs")
    scores = cam_scores(config, seen)
    name = "ceiling" if config.demo.seeds == "exact" else "weakclip"
    for index, prefix in ((seen, ""), (unseen, "unseen_")):
        for suffix, field in (("", None), ("_crf", crf_settings(config))):
            _say(f"pseudo masks: {ROWS[prefix + name + suffix]}")
            settings = replace(config, pseudo=replace(config.pseudo, crf=field))
            scores[prefix + name + suffix] = mask_score(settings, index, folder / "pseudo" / (prefix + name + suffix))
    rounded = {name: round(value, 2) for name, value in scores.items()}
    write_whole(folder / "scores.json", json.dumps(rounded, indent=1) + "\n")
    draw(config, seen, folder / "pseudo" / name).save(folder / "pictures.png")
    return scores


def mask_score(config: Config, index: Index, out: Path) -> float:
    """mIoU (%) of the last weights' masks of a shard set; the masks go to `out`."""
    pseudo.run(config, str(index.root), weights.find(config, "last"), out)
    return 100 * score(_samples(config, index), lambda sample: masks.read(out, sample.key), index.classes).miou


def crf_settings(config: Config) -> CrfConfig:
    return config.pseudo.crf or CrfConfig()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def table(scores: dict[str, float]) -> str:
    width = max(len(ROWS[name]) for name in scores)
    return "\n".join(
        [f"{'mIoU against the exact masks':<{width}}      %"] + [f"{ROWS[n]:<{width}} {v:6.1f}" for n, v in scores.items()]
    )


def make_shards(config: Config, seen: Path, unseen: Path) -> tuple[Index, Index]:
    """Shards of the training pictures, with CAMs (or exact seeds), and of a quarter as many unseen ones."""
    names = labels.class_names(config.classes)
    if not (seen / "index.json").is_file() or not (unseen / "index.json").is_file():
        demo = config.demo
        _say(f"drawing {demo.size} pictures")
        drawn = [world.picture(demo.seed, index) for index in tqdm(range(demo.size), "drawing", unit="picture", disable=None)]
        _say(f"training the network whose activations are the CAMs, {demo.cam_steps} steps")
        network = cam.train_network(*_training_set(drawn, len(names)), steps=demo.cam_steps, seed=demo.seed)

        def training_sample(index: int) -> Sample:
            maps = cam.activation_maps(network, _tensor(drawn[index]), drawn[index].classes)
            exact = _png(drawn[index].mask) if demo.seeds == "exact" else None
            return replace(shard_sample(f"train_{index:05d}", drawn[index]), cam=maps, seed=exact)

        def unseen_sample(index: int) -> Sample:
            return shard_sample(f"unseen_{index:05d}", world.picture(demo.seed, UNSEEN + index))

        for path, load, count in ((seen, training_sample, demo.size), (unseen, unseen_sample, demo.size // 4)):
            if not (path / "index.json").is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                build_shards(range(count), load, path, names, samples_per_shard=64)
    return open_index(str(seen), names), open_index(str(unseen), names)


def _training_set(drawn: list[world.Picture], num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels_NF = torch.zeros(len(drawn), num_classes - 1)
    for row, picture in enumerate(drawn):
        labels_NF[row, [index - 1 for index in picture.classes]] = 1
    return torch.stack([_tensor(picture) for picture in drawn]), labels_NF


def _tensor(picture: world.Picture) -> torch.Tensor:
    return torch.from_numpy(picture.image).permute(2, 0, 1).contiguous()


def shard_sample(key: str, picture: world.Picture) -> Sample:
    buffer = io.BytesIO()
    Image.fromarray(picture.image).save(buffer, "JPEG", quality=95)
    H, W = picture.mask.shape
    return Sample(key, buffer.getvalue(), "jpg", picture.classes, H, W, "demo world", mask=_png(picture.mask))


def _png(mask_HW: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask_HW).save(buffer, "PNG")
    return buffer.getvalue()


def _samples(config: Config, index: Index) -> Iterable[DecodedSample]:
    return StoredSamples(index, index.entries, config.data.workers)


def cam_scores(config: Config, index: Index) -> dict[str, float]:
    """mIoU (%) of the CAMs at their best single threshold, and of the same after a dense CRF with the published setting."""
    scores = best_cam_threshold(_samples(config, index), index.classes)

    def refined(sample: DecodedSample) -> np.ndarray:
        probs_nHW = cam_to_probabilities(cam_maps(sample), scores.threshold)
        return np.array([0, *sample.cam.classes], np.uint8)[crf.refine(probs_nHW, sample.image, crf_settings(config))]  # type: ignore[union-attr]

    return {"cam": 100 * scores.miou, "cam_crf": 100 * score(_samples(config, index), refined, index.classes).miou}


def draw(config: Config, index: Index, made: Path, count: int = 12) -> Image.Image:
    """Image, CAM, seed, WeakCLIP's mask and the exact one."""
    rows = []
    for sample in StoredSamples(index, index.entries[:count], workers=0):
        coloured = [seed_mask(sample, config.seeds), masks.read(made, sample.key), truth(sample)]
        found = [sample.image, pictures.heat(sample.image, cam_maps(sample)), *map(pictures.colour_mask, coloured)]
        rows.append(pictures.Row(sample.key, sample.classes, found))
    return pictures.sheet(rows, index.classes, ("image", "CAM", "seed (white: ignored)", "WeakCLIP", "exact mask"))
