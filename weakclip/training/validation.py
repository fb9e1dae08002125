"""What a training job does now and then: pictures, the mIoU on the validation set, and keeping the best weights."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from weakclip.checkpoints import weights
from weakclip.config import Config
from weakclip.data.index import Index, ShardError
from weakclip.data.reading import load
from weakclip.data.stream import StoredSamples
from weakclip.evaluation import visualize
from weakclip.evaluation.metrics import Scores, confusion
from weakclip.masks import sliding_window
from weakclip.models.interface import Trained
from weakclip.runtime.atomic import write_whole
from weakclip.training.engine import Engine, World
from weakclip.training.jobs import Task
from weakclip.training.monitor import Monitor


def validate(engine: Engine, monitor: Monitor, task: Task, index: Index, validation: Index | None) -> None:
    """Pictures of the first training images, the mIoU on the validation set, and its best weights."""
    model = engine.refresh_plain()
    monitor.say(f"validating at step {engine.step}")
    if monitor.leader and task.config.train.pictures:
        monitor.show("training images", picture_sheet(model, task, index))
    if validation is None:
        return
    scores = validation_scores(model, engine.world, task.config, validation)
    best = task.run / "best.json"
    if not monitor.leader:
        return
    monitor.write({"validation/miou": 100 * scores.miou})
    previous = json.loads(best.read_text()) if best.is_file() else {"miou": -1.0, "step": 0}
    better = 100 * scores.miou > previous["miou"] or previous["step"] > engine.step
    if better:
        weights.save(model, task.run / "weights" / "best.safetensors", engine.step)
        write_whole(best, json.dumps({"step": engine.step, "miou": 100 * scores.miou}) + "\n")
    monitor.say(f"validation mIoU {100 * scores.miou:.2f} %{', the best so far' if better else ''}")


def validation_scores(model: Any, world: World, config: Config, validation: Index) -> Scores:
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
        probs_KHW = sliding_window.predict(predictor, sample.image, config.pseudo.single_scale(), config.data.scale)
        matrix_KK += torch.from_numpy(confusion(sample.mask, probs_KHW.argmax(0).byte().cpu().numpy(), K))
    total_KK = matrix_KK.to(world.device)
    dist.all_reduce(total_KK)
    return Scores.of(total_KK.cpu().numpy(), validation.classes)


def picture_sheet(model: Trained, task: Task, index: Index) -> Image.Image:
    """The first training images and what the task shows beside them; unreadable ones are left out."""
    rows = []
    for entry in index.entries[: task.config.train.pictures]:
        try:
            sample = load(index, entry)
            shown = [sample.image, *task.columns(model, sample)]
        except ShardError:
            continue
        rows.append(visualize.Row(sample.key, sample.classes, shown))
    return visualize.sheet(rows, index.classes)
