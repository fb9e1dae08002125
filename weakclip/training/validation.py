"""Validation during training: visualisations, the mIoU on the validation set, and the best weights."""

from __future__ import annotations

import json
import logging
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from weakclip.checkpoints import weights
from weakclip.data.index import Index, ShardError
from weakclip.data.reading import load
from weakclip.data.stream import StoredSamples
from weakclip.evaluation import visualize
from weakclip.evaluation.metrics import Scores, confusion
from weakclip.masks import sliding_window
from weakclip.models.interface import Trained
from weakclip.runtime.atomic import write_whole
from weakclip.training.engine import Engine
from weakclip.training.jobs import Job
from weakclip.training.monitor import Monitor
from weakclip.training.tasks import Task
from weakclip.training.world import World

_log = logging.getLogger(__name__)


def validate(engine: Engine, monitor: Monitor, task: Task, index: Index, validation: Index | None) -> None:
    """Show the first training images, compute the validation mIoU, and keep the best weights. Every rank must call it."""
    model, job = engine.refresh_plain(), task.job
    if monitor.leader and validation is not None:
        _log.info("validating at step %d", engine.step)
    if monitor.leader and job.train.pictures:
        monitor.show("training images", picture_sheet(model, task, index))
    if validation is None:
        return
    scores = validation_scores(model, engine.world, job, validation)
    best = job.run.best
    if not monitor.leader:
        return
    monitor.write({"validation/miou": 100 * scores.miou})
    previous = json.loads(best.read_text()) if best.is_file() else {"miou": -1.0, "step": 0}
    better = 100 * scores.miou > previous["miou"] or previous["step"] > engine.step
    if better:
        weights.save(model, job.run.weights("best"), engine.step)
        write_whole(best, json.dumps({"step": engine.step, "miou": 100 * scores.miou}) + "\n")
    _log.info("validation mIoU %.2f %%%s", 100 * scores.miou, ", the best so far" if better else "")


def validation_scores(model: Any, world: World, job: Job, validation: Index) -> Scores:
    """Return the scores at one scale without a CRF. Every rank must call it; they share the images."""
    entries = validation.entries[: job.train.validate_images]
    K = len(validation.classes)
    matrix_KK = torch.zeros(K, K, dtype=torch.int64)
    predictor = model.predictor()
    mine = entries[world.rank :: world.ranks]
    samples = StoredSamples(validation, mine, job.data.workers)
    for sample in tqdm(samples, "validation", leave=False, disable=None if world.rank == 0 else True):
        if sample.mask is None:
            where = f"data.val: {validation.storage}: {sample.name}"
            raise ShardError(f"{where} has no ground-truth mask; build the shards with --masks")
        probs_KHW = sliding_window.predict(predictor, sample.image, job.inference.single_scale(), job.data.scale)
        matrix_KK += torch.from_numpy(confusion(sample.mask, probs_KHW.argmax(0).byte().cpu().numpy(), K))
    total_KK = matrix_KK.to(world.device)
    dist.all_reduce(total_KK)
    return Scores.of(total_KK.cpu().numpy(), validation.classes)


def picture_sheet(model: Trained, task: Task, index: Index) -> Image.Image:
    """Return a sheet of the first training images with the task's columns. Unreadable images are left out."""
    rows = []
    for entry in index.entries[: task.job.train.pictures]:
        try:
            sample = load(index, entry)
            shown = [sample.image, *task.columns(model, sample)]
        except ShardError:
            continue
        rows.append(visualize.Row(sample.name, sample.classes, shown))
    return visualize.sheet(rows, index.classes)
