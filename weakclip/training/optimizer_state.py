"""The optimizer's moments of any ZeRO stage as plain tensors, and back, so that any number of ranks and stage can resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weakclip.training.world import deepspeed

MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.SGD: ("momentum_buffer",),
}


def moments(engine: Any) -> dict[str, Tensor]:
    """Return the full moments of every trained parameter of a DeepSpeed engine, on the CPU, by name such as "exp_avg/NAME".

    Every rank must call it, after the first step.
    """
    return {
        f"{moment}/{name}": _whole(engine, parameter, moment).cpu()
        for name, parameter in _trained(engine)
        for moment in MOMENTS[type(_optimizer(engine))]
    }


def set_moments(engine: Any, tensors: Mapping[str, Tensor] | None, step: int) -> None:
    """Set the moments of a new engine to those that `moments` returned after `step` steps; None: zeros. Every rank must call it.

    Zeros must be set too: by itself, ZeRO links parameters to moments as soon as the first of several groups has any.
    """
    stage, optimizer = engine.zero_optimization_stage(), _optimizer(engine)
    names = MOMENTS[type(optimizer)]
    # The optimizer steps on the parameters, or on ZeRO's flat partitions, which stage 3 exposes only during a step.
    shown = [part for group in optimizer.param_groups for part in group["params"]]
    held = engine.optimizer.fp32_partitioned_groups_flat if stage == 3 else shown
    for part in held:
        optimizer.state[part] = {
            "step": torch.tensor(float(step), device=part.device),  # where the fused optimizer counts
            **{name: torch.zeros_like(part) for name in names},
        }
    if stage in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # DeepSpeed would do this in its first step
    if tensors is None:
        return
    for name, parameter in _trained(engine):
        for moment in names:
            value = tensors[f"{moment}/{name}"].to(engine.device)
            if stage == 0:
                optimizer.state[parameter][moment].copy_(value)
            elif stage == 3:
                deepspeed.utils.safe_set_local_optimizer_state(parameter, _part(parameter, value), moment)
            else:
                deepspeed.utils.safe_set_full_optimizer_state(parameter, value, moment)


def _optimizer(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer  # ZeRO wraps it


def _trained(engine: Any) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def _whole(engine: Any, parameter: nn.Parameter, moment: str) -> Tensor:
    if engine.zero_optimization_stage() == 0:
        return engine.optimizer.state[parameter][moment]
    return deepspeed.utils.safe_get_full_optimizer_state(parameter, moment)


def _part(parameter: Any, value: Tensor) -> Tensor:
    """Return this rank's part of a tensor, partitioned as ZeRO 3 does: equal lengths, the last one padded."""
    length, ranks = parameter.ds_tensor.numel(), torch.distributed.get_world_size()
    padded = F.pad(value.flatten(), (0, length * ranks - value.numel()))
    return padded[length * torch.distributed.get_rank() :][:length]
