"""DeepSpeed around the network of a task: join the ranks, initialise, step, save, resume."""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# DeepSpeed calls collectives that torch has renamed, with a warning at every step.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns about the accelerators it looked for in vain

import deepspeed

from weakclip.checkpoints import state_dict, weight_files, weights
from weakclip.config import Config, ConfigError, OptimConfig
from weakclip.data.photometric import distort
from weakclip.data.stream import Batch
from weakclip.models.interface import Targets, Trained
from weakclip.runtime import rendezvous
from weakclip.runtime.atomic import write_whole
from weakclip.runtime.run_dir import checkpoints
from weakclip.training import optimizer_state
from weakclip.training.sync_batchnorm import synchronise


@dataclass(frozen=True)
class World:
    rank: int
    ranks: int
    device: torch.device

    @classmethod
    def join(cls) -> World:
        """This process among those that torchrun, Slurm or another launcher started, or alone."""
        os.environ.update(rendezvous.variables(os.environ))
        cuda = torch.cuda.is_available()
        # Slurm may show each rank its own GPU alone.
        number = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count() if cuda else 0
        device = torch.device("cuda", number) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Compiling this kernel would cost a CPU's first run over a minute, and only inference_all_reduce, unused here, calls it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def gather(self, item: Any) -> list[Any]:
        """`item` of every rank, on every rank."""
        items = [None] * self.ranks
        dist.all_gather_object(items, item)
        return items


def learning_rate_factor(step: int, config: OptimConfig, steps: int) -> float:
    """Factor on `lr` at `step` of `steps`: a cosine or a power down to `min_lr`, multiplied by a linear warm-up from 1e-6."""
    low, done = config.min_lr / config.lr, min(step / steps, 1)
    course = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else (1 - done) ** config.power
    warm = 1 - (1 - step / config.warmup) * (1 - 1e-6) if step < config.warmup else 1
    return (low + (1 - low) * course) * warm


def make_optimizer(model: Trained, config: OptimConfig) -> torch.optim.Optimizer:
    """The one that the config asks for."""
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    weights = {id(module.weight) for module in model.modules() if isinstance(module, layers)}
    settings = []
    for group in model.groups():
        decayed = [p for p in group.parameters if config.decay == "all" or id(p) in weights]
        rest = [p for p in group.parameters if config.decay != "all" and id(p) not in weights]
        for parameters, decay in ((decayed, config.weight_decay), (rest, 0.0)):
            if parameters:
                settings.append({"params": parameters, "lr": config.lr * group.lr, "weight_decay": decay})
    return torch.optim.SGD(settings, momentum=0.9) if config.optimizer == "sgd" else torch.optim.AdamW(settings)


class Engine:
    """A network in training. `step` counts optimiser steps, `consumed` the samples of all ranks so far."""

    def __init__(self, model: Trained, config: Config, world: World, resume: Path | None = None) -> None:
        """resume: checkpoint to go on from, whatever ranks and ZeRO stage wrote it.

        Raises ArchiveError or ConfigError when it is damaged or another model's.
        """
        self.config, self.world = config, world
        self.step = self.consumed = 0
        moments = self._load(model, resume) if resume else None
        model = model.to(world.device)
        # What validates and is saved: an ordinary module beside the one that ZeRO may have cut up.
        self.plain = model.twin().eval()
        done = self.step
        self._engine, *_ = deepspeed.initialize(
            model=synchronise(model, world.device),
            optimizer=make_optimizer(model, config.optim),
            lr_scheduler=lambda wrapped: torch.optim.lr_scheduler.LambdaLR(
                wrapped, lambda more: learning_rate_factor(done + more, config.optim, config.train.steps)
            ),
            config=deepspeed_settings(config),
        )
        optimizer_state.set_moments(self._engine, moments, self.step)

    def _load(self, model: Trained, path: Path) -> dict[str, Tensor]:
        """Take the model's weights, the step and the samples consumed from a checkpoint; returns the optimiser's moments."""
        tensors, meta = weight_files.read(path)
        state = {name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")}
        state_dict.load_into(model, state, str(path), "go on with the config that wrote it")
        self.step, self.consumed = int(meta["step"]), int(meta["consumed"])
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("model/")}

    @property
    def global_batch(self) -> int:
        return self.config.train.batch * self.config.train.accumulate * self.world.ranks

    @property
    def lr(self) -> float:
        return self._engine.get_lr()[0]

    def train_step(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """One optimiser step on this rank's micro-batches -> mean losses by name, on the device (no synchronisation)."""
        # Dropout and stochastic depth depend on the step and the rank alone, so a resumed run draws the same.
        torch.manual_seed((self.config.seed * 1_000_003 + self.step) * self.world.ranks + self.world.rank)
        self._engine.train()
        sums: dict[str, Tensor] = {}
        for batch in batches:
            targets = self._targets(batch)
            losses = self.plain.losses(self._engine(targets.images_B3HW), targets)
            losses["total"] = torch.stack(list(losses.values())).sum()
            self._engine.backward(losses["total"])
            self._note_gradient_norm()
            self._engine.step()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach() / len(batches)
        self.step += 1
        self.consumed += self.global_batch
        return sums

    def _targets(self, batch: Batch) -> Targets:
        device = self.world.device
        distorted_B3HW = distort(batch.images.to(device), batch.photometric.to(device))
        images_B3HW = self.plain.normalisation.apply(distorted_B3HW)
        return Targets(images_B3HW, batch.seeds.to(device).long(), batch.labels.to(device))

    def _note_gradient_norm(self) -> None:
        """ZeRO knows the norm after its step; plain data parallelism (stage 0) has whole gradients, before it."""
        if self._stage == 0 and self._engine.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            self._whole_norm = torch.nn.utils.get_total_norm(gradients)

    @property
    def gradient_norm(self) -> float:
        """Of the last step, before clipping."""
        return float(self._whole_norm if self._stage == 0 else self._engine.get_global_grad_norm())

    def refresh_plain(self) -> Trained:
        """`plain` with the present weights. Every rank must call it."""
        module = self._engine.module
        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            self.plain.load_state_dict(module.state_dict())
        return self.plain

    def save(self, run: Path) -> None:
        """Write checkpoints/step-N and weights/last.safetensors. Every rank must call it; a reader never sees half of it."""
        moments = optimizer_state.moments(self._engine)
        self.refresh_plain()
        if self.world.rank == 0:
            state = {f"model/{name}": tensor for name, tensor in self.plain.state_dict().items()} | moments
            meta = {"step": str(self.step), "consumed": str(self.consumed)}
            (run / "checkpoints").mkdir(exist_ok=True)
            write_whole(run / "checkpoints" / f"step-{self.step}.safetensors", weights.packed(state, meta))
            stale = (run / "checkpoints").glob("*.partial")  # of a run that was killed as it wrote
            for old in [*checkpoints(run)[: -self.config.train.keep_checkpoints], *stale]:
                old.unlink()
            weights.save(self.plain, run / "weights" / "last.safetensors", self.step)
        dist.barrier()

    @property
    def _stage(self) -> int:
        return self._engine.zero_optimization_stage()


def deepspeed_settings(config: Config) -> dict[str, Any]:
    """DeepSpeed's configuration: the file that `train.deepspeed` names, with what our config decides filled in.

    Raises ConfigError when the file is missing, isn't JSON, or sets what our config sets.
    """
    path = Path(config.train.deepspeed)
    ours = {
        "train_micro_batch_size_per_gpu": config.train.batch,
        "gradient_accumulation_steps": config.train.accumulate,
        "gradient_clipping": config.optim.clip_grad,
    }
    try:
        settings = json.loads(path.read_text())
        stage = settings["zero_optimization"]["stage"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"train.deepspeed: {path} is not DeepSpeed JSON with zero_optimization.stage ({error!r})") from error
    taken = [key for key in (*ours, "train_batch_size", "optimizer", "scheduler", "bf16", "fp16") if key in settings]
    if taken or stage not in (0, 1, 2, 3):
        raise ConfigError(f"train.deepspeed: {path} sets {', '.join(taken) or f'stage {stage}'}; set it in the recipe instead")
    return settings | ours
