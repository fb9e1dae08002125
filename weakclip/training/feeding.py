"""Copying of batches to the device, while it computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from weakclip.data.stream import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches on `device`. On a GPU each is copied on a stream of its own, beside the kernels of the step before."""
    if device.type != "cuda":
        yield from batches
        return
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for batch in batches:  # a step only queues its kernels, so the next copy begins while they run
        with torch.cuda.stream(copying):
            batch = batch._replace(**{name: part.to(device, non_blocking=True) for name, part in _tensors(batch).items()})
        computing.wait_stream(copying)
        for part in _tensors(batch).values():
            part.record_stream(computing)  # or its memory is reused while a kernel still reads it
        yield batch


def _tensors(batch: Batch) -> dict[str, Any]:
    return {name: part for name, part in batch._asdict().items() if isinstance(part, Tensor)}
