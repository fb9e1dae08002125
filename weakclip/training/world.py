"""The ranks of a training job, and joining them."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# DeepSpeed calls collectives that torch has renamed, which warns at every step.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns about each accelerator that it did not find

import deepspeed

from weakclip.runtime import rendezvous


@dataclass(frozen=True)
class World:
    rank: int
    ranks: int
    device: torch.device

    @classmethod
    def join(cls) -> World:
        """Join the processes that torchrun, Slurm or another launcher started, if any. Returns this rank's place among them."""
        os.environ.update(rendezvous.variables(os.environ))
        cuda = torch.cuda.is_available()
        # Slurm may show each rank only its own GPU.
        number = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count() if cuda else 0
        device = torch.device("cuda", number) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        logger = logging.getLogger("DeepSpeed")
        logger.handlers.clear()  # it writes to stdout; its notices belong into the log file
        logger.propagate = True
        logger.setLevel(logging.INFO)
        # Compiling this kernel takes over a minute in the first CPU run, and only inference_all_reduce, unused here, calls it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def leave(self) -> None:
        """Leave the other ranks."""
        dist.destroy_process_group()

    def gather(self, item: Any) -> list[Any]:
        """Return `item` of every rank, on every rank."""
        items = [None] * self.ranks
        dist.all_gather_object(items, item)
        return items
