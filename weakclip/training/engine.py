"""DeepSpeed around the network of a job: initialize, step, save, resume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weakclip.checkpoints import state_dict, weight_files, weights
from weakclip.config import ConfigError, OptimConfig
from weakclip.data.photometric import distort
from weakclip.data.stream import Batch
from weakclip.models.interface import Targets, Trained
from weakclip.runtime import compilation
from weakclip.runtime.atomic import write_whole
from weakclip.runtime.run_dir import RunDir
from weakclip.training import optimizer_state
from weakclip.training.deepspeed_settings import deepspeed_settings
from weakclip.training.jobs import Job
from weakclip.training.sync_batchnorm import synchronise
from weakclip.training.world import World, deepspeed


def learning_rate_factor(step: int, config: OptimConfig, steps: int) -> float:
    """Return the factor on `lr` at a step: cosine or polynomial decay to `min_lr`, times a linear warm-up from 1e-6."""
    low, done = config.min_lr / config.lr, min(step / steps, 1)
    course = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else (1 - done) ** config.power
    warm = 1 - (1 - step / config.warmup) * (1 - 1e-6) if step < config.warmup else 1
    return (low + (1 - low) * course) * warm


def make_optimizer(model: Trained, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer of a config, with weight decay on the parameters that `decay` selects."""
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    weights = {id(module.weight) for module in model.modules() if isinstance(module, layers)}
    settings = []
    for group in model.groups():
        decayed = [p for p in group.parameters if config.decay == "all" or id(p) in weights]
        rest = [p for p in group.parameters if config.decay != "all" and id(p) not in weights]
        for parameters, decay in ((decayed, config.weight_decay), (rest, 0.0)):
            if parameters:
                settings.append({"params": parameters, "lr": config.lr * group.lr, "weight_decay": decay})
    if config.optimizer == "sgd":
        return torch.optim.SGD(settings, momentum=0.9)
    return torch.optim.AdamW(settings, fused=True)


def compiles(setting: str, stage: int, device: torch.device) -> bool:
    """Return whether steps are compiled. setting: `train.compile`. Raises ConfigError where it is on at ZeRO stage 3."""
    if setting == "on" and stage == 3:  # its hooks gather parameters inside the regions
        raise ConfigError("train.compile=on does not work with ZeRO stage 3; use auto, or train.deepspeed with a lower stage")
    return setting == "on" or (setting == "auto" and stage < 3 and device.type == "cuda")


class Engine:
    """A network in training. `step` counts optimizer steps, `consumed` the samples of all ranks so far."""

    def __init__(self, model: Trained, job: Job, world: World, resume: Path | None = None) -> None:
        """resume: checkpoint to resume from, written by any number of ranks at any ZeRO stage.

        Raises ArchiveError or ConfigError when it is damaged or belongs to another model.
        """
        self.job, self.world = job, world
        self.step = self.consumed = 0
        self.earlier_batch: int | None = None
        """Samples of all ranks in the last step before this start."""
        settings = deepspeed_settings(job.train, job.optim, job.prefix)
        compilation.switch(compiles(job.train.compile, settings["zero_optimization"]["stage"], world.device))
        moments = self._load(model, resume) if resume else None
        model = model.to(world.device)
        model.cast_frozen()
        # The module that is validated and saved: a plain copy beside the one whose parameters ZeRO may partition.
        self.plain = model.twin().eval()
        done = self.step
        self._engine, *_ = deepspeed.initialize(
            model=synchronise(model, world.device, world.ranks),
            optimizer=make_optimizer(model, job.optim),
            lr_scheduler=lambda wrapped: torch.optim.lr_scheduler.LambdaLR(
                wrapped, lambda more: learning_rate_factor(done + more, job.optim, job.train.steps)
            ),
            config=settings,
        )
        optimizer_state.set_moments(self._engine, moments, self.step)

    def _load(self, model: Trained, path: Path) -> dict[str, Tensor]:
        """Load the model's weights, the step and the samples consumed from a checkpoint. Returns the optimizer's moments."""
        tensors, meta = weight_files.read(path)
        state = {name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")}
        state_dict.load_into(model, state, str(path), "use the config that wrote it")
        self.step, self.consumed = int(meta["step"]), int(meta["consumed"])
        self.earlier_batch = int(meta.get("batch", self.consumed // self.step))  # which earlier versions did not save
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("model/")}

    @property
    def global_batch(self) -> int:
        return self.job.train.batch * self.job.train.accumulate * self.world.ranks

    @property
    def lr(self) -> float:
        return self._engine.get_lr()[0]

    def train_step(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Do one optimizer step on this rank's micro-batches, which are on the device. Returns mean losses by name, on it too."""
        # Dropout and stochastic depth depend only on the step and the rank, so a resumed run draws the same.
        torch.manual_seed((self.job.recipe.seed * 1_000_003 + self.step) * self.world.ranks + self.world.rank)
        self._engine.train()
        sums: dict[str, Tensor] = {}
        for batch in batches:
            targets = self.targets(batch)
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

    def targets(self, batch: Batch) -> Targets:
        """Return what the network learns from a batch on the device, with its images distorted and normalised."""
        images_B3HW = self.plain.normalisation.apply(distort(batch.images, batch.photometric))
        return Targets(images_B3HW, batch.seeds.long(), batch.labels)

    def _note_gradient_norm(self) -> None:
        """Store the gradient norm at stage 0, from the full gradients before the step. ZeRO reports the norm after its step."""
        if self._stage == 0 and self._engine.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            self._whole_norm = torch.nn.utils.get_total_norm(gradients)

    @property
    def gradient_norm(self) -> float:
        """Gradient norm of the last step, before clipping."""
        return float(self._whole_norm if self._stage == 0 else self._engine.get_global_grad_norm())

    def refresh_plain(self) -> Trained:
        """Return `plain` with the current weights. Every rank must call it."""
        module = self._engine.module
        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            self.plain.load_state_dict(module.state_dict())
        return self.plain

    def save(self, run: RunDir) -> None:
        """Write a checkpoint and the last weights. Every rank must call it. A reader never sees an incomplete file."""
        moments = optimizer_state.moments(self._engine)
        self.refresh_plain()
        if self.world.rank == 0:
            state = {f"model/{name}": tensor for name, tensor in self.plain.state_dict().items()} | moments
            meta = {"step": str(self.step), "consumed": str(self.consumed), "batch": str(self.global_batch)}
            path = run.checkpoint(self.step)
            path.parent.mkdir(exist_ok=True)
            write_whole(path, weights.packed(state, meta))
            stale = path.parent.glob("*.partial")  # left by a run that was killed while it wrote
            for old in [*run.checkpoints()[: -self.job.train.keep_checkpoints], *stale]:
                old.unlink()
            weights.save(self.plain, run.weights("last"), self.step)
        dist.barrier()

    @property
    def _stage(self) -> int:
        return self._engine.zero_optimization_stage()
