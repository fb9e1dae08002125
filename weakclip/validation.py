"""What a training job does now and then: pictures, the mIoU on the validation set, and keeping the best weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from weakclip import infer, pictures, weights
from weakclip.config import Config, PseudoConfig
from weakclip.data.shard import Index, ShardError
from weakclip.data.stream import StoredSamples, cam_maps, load, seed_mask
from weakclip.engine import Engine, World
from weakclip.files import write_whole
from weakclip.metrics import Scores, confusion
from weakclip.model import WeakCLIP
from weakclip.monitor import Monitor


def validate(engine: Engine, monitor: Monitor, config: Config, run: Path, index: Index, validation: Index | None) -> None:
    """Pictures of the first training images, the mIoU on the validation set, and its best weights."""
    model = engine.refresh_plain()
    monitor.say(f"validating at step {engine.step}")
    if monitor.leader and config.train.pictures:
        monitor.show("training images", picture_sheet(model, config, index))
    if validation is None:
        return
    scores = validation_scores(model, engine.world, config, validation)
    best = run / "best.json"
    if not monitor.leader:
        return
    monitor.write({"validation/miou": 100 * scores.miou})
    previous = json.loads(best.read_text()) if best.is_file() else {"miou": -1.0, "step": 0}
    better = 100 * scores.miou > previous["miou"] or previous["step"] > engine.step
    if better:
        weights.save(model, run / "weights" / "best.safetensors", engine.step)
        write_whole(best, json.dumps({"step": engine.step, "miou": 100 * scores.miou}) + "\n")
    monitor.say(f"validation mIoU {100 * scores.miou:.2f} %{', the best so far' if better else ''}")


def single_scale(config: Config) -> PseudoConfig:
    return PseudoConfig([1.0], False, config.pseudo.window, config.pseudo.stride, config.pseudo.window_batch, crf=None)


def validation_scores(model: WeakCLIP, world: World, config: Config, validation: Index) -> Scores:
    """mIoU at one scale without a CRF; each rank takes every so many images, and the counts are added."""
    entries = validation.entries[: config.train.validate_images]
    K = len(validation.classes)
    matrix_KK = torch.zeros(K, K, dtype=torch.int64)
    predictor = model.predictor()
    mine = entries[world.rank :: world.ranks]
    samples = StoredSamples(validation, mine, config.data.workers)
    for sample in tqdm(samples, "validation", leave=False, disable=None if world.rank == 0 else True):
        if sample.mask is None:
            where = f"data.val: {validation.storage}: {sample.key}"
            raise ValueError(f"{where} has no ground-truth mask; build the shards with --masks")
        probs_KHW = infer.predict(predictor, sample.image, single_scale(config), config.data.scale)
        matrix_KK += torch.from_numpy(confusion(sample.mask, probs_KHW.argmax(0).byte().cpu().numpy(), K))
    total_KK = matrix_KK.to(world.device)
    dist.all_reduce(total_KK)
    return Scores.of(total_KK.cpu().numpy(), validation.classes)


def picture_sheet(model: WeakCLIP, config: Config, index: Index) -> Image.Image:
    """Image, CAM, seed and prediction of the first training images; unreadable ones are left out."""
    predictor, rows = model.predictor(), []
    for entry in index.entries[: config.train.pictures]:
        try:
            sample = load(index, entry)
            seed_HW = seed_mask(sample, config.seeds)
        except ShardError:
            continue
        prediction_HW = infer.predict(predictor, sample.image, single_scale(config), config.data.scale).argmax(0).cpu().numpy()
        found = [sample.image, pictures.colour_mask(seed_HW), pictures.colour_mask(prediction_HW)]
        if sample.cam is not None:
            found.insert(1, pictures.heat(sample.image, cam_maps(sample)))
        rows.append(pictures.Row(sample.key, sample.classes, found))
    return pictures.sheet(rows, index.classes)
