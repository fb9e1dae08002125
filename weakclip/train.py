"""Train WeakCLIP.

torchrun --nproc_per_node N -m weakclip.train --config configs/coco.yaml [--resume auto] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from weakclip import cli, infer, labels, pictures
from weakclip import run as runs
from weakclip.config import Config, PseudoConfig
from weakclip.data.shard import Index, ShardError
from weakclip.data.stream import StoredSamples, cam_maps, load, open_index, seed_mask, training_batches
from weakclip.engine import Engine, World, save_weights
from weakclip.metrics import Scores, confusion
from weakclip.model import WeakCLIP
from weakclip.monitor import Monitor


def train(config: Config, world: World, resume: bool = False) -> Path:
    """Run the job that `config` describes, on all ranks; returns the run directory.

    Raises ValueError (ConfigError, ShardError) for what the user can mend.
    """
    names = labels.class_names(config.classes)
    index = open_index(config.data.train, names)
    validation = open_index(config.data.val, names) if config.data.val else None
    run = _claim(config, world, resume)
    torch.manual_seed(config.seed)
    engine = Engine(WeakCLIP(config, names), config, world)
    if resume:
        engine.resume(run)
    monitor = Monitor(run, config, engine)
    batches = training_batches(index, config, engine.consumed, world.rank, world.ranks)
    while engine.step < config.train.steps:
        with monitor.waiting():
            micro_batches = list(islice(batches, config.train.accumulate))
        monitor.step(micro_batches, engine.train_step(micro_batches))
        last = engine.step == config.train.steps
        if last or engine.step % config.train.validate_every == 0:
            validate(engine, monitor, config, run, index, validation)
        if last or engine.step % config.train.checkpoint_every == 0:
            engine.save(run)
        monitor.pause()
    monitor.close()
    return run


def _claim(config: Config, world: World, resume: bool) -> Path:
    """Rank 0 looks at the run directory; all hear of what is wrong with it."""
    error = None
    if world.rank == 0:
        try:
            runs.claim(config, resume)
        except ValueError as caught:
            error = caught
    if error := world.gather(error)[0]:
        raise error
    return Path(config.run)


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
        save_weights(model, run / "weights" / "best.safetensors", engine.step)
        best.write_text(json.dumps({"step": engine.step, "miou": 100 * scores.miou}) + "\n")
    monitor.say(f"validation mIoU {100 * scores.miou:.2f} %{', the best so far' if better else ''}")


def single_scale(config: Config) -> PseudoConfig:
    return PseudoConfig([1.0], False, config.pseudo.window, config.pseudo.stride, config.pseudo.window_batch, crf=None)


def validation_scores(model: WeakCLIP, world: World, config: Config, validation: Index) -> Scores:
    """mIoU at one scale without a CRF; each rank takes every so many images, and the counts are added."""
    entries = validation.entries[: config.train.validate_images]
    K = len(validation.classes)
    matrix_KK = torch.zeros(K, K, dtype=torch.int64)
    text_KE = model.encode_names().detach()
    mine = entries[world.rank :: world.ranks]
    samples = StoredSamples(validation, mine, config.data.workers)
    for sample in tqdm(samples, "validation", leave=False, disable=None if world.rank == 0 else True):
        if sample.mask is None:
            raise ValueError(f"data.val: {validation.root}: {sample.key} has no ground-truth mask; build the shards with --masks")
        probs_KHW = infer.predict(model, sample.image, single_scale(config), config.data.scale, text_KE)
        matrix_KK += torch.from_numpy(confusion(sample.mask, probs_KHW.argmax(0).byte().cpu().numpy(), K))
    total_KK = matrix_KK.to(world.device)
    dist.all_reduce(total_KK)
    return Scores.of(total_KK.cpu().numpy(), validation.classes)


def picture_sheet(model: WeakCLIP, config: Config, index: Index) -> Image.Image:
    """Image, CAM, seed and prediction of the first training images; unreadable ones are left out."""
    rows = []
    for entry in index.entries[: config.train.pictures]:
        try:
            sample = load(index, entry)
            seed_HW = seed_mask(sample, config.seeds)
        except ShardError:
            continue
        prediction_HW = infer.predict(model, sample.image, single_scale(config), config.data.scale).argmax(0).cpu().numpy()
        found = [sample.image, pictures.colour_mask(seed_HW), pictures.colour_mask(prediction_HW)]
        if sample.cam is not None:
            found.insert(1, pictures.heat(sample.image, cam_maps(sample)))
        rows.append(pictures.Row(sample.key, sample.classes, found))
    return pictures.sheet(rows, index.classes)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m weakclip.train", description="Train WeakCLIP; see also torchrun.")
    parser.add_argument("--resume", choices=("auto", "never"), default="never", help="auto: go on with the run, if there is one")
    config, options = cli.parse_config(parser, arguments)
    world = World.join()
    try:
        run = train(config, world, options.resume == "auto")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if world.rank == 0:
        print(f"trained: {run}/weights; look at it with: tensorboard --logdir {run}/tensorboard")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
