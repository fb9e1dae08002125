"""Prints how often our code reads a value from the device, or sends it one, during two training steps: CONFIG."""

from __future__ import annotations

import sys
import traceback
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from weakclip import labels, recipe
from weakclip.data.stream import Batch
from weakclip.models.weakclip import WeakCLIP
from weakclip.training import jobs
from weakclip.training.engine import Engine
from weakclip.training.world import World


class Reads(TorchDispatchMode):
    """Counts `.item()`, `bool(tensor)`, `torch.tensor(...)` and the like by the innermost line of weakclip that waits."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default):
            self.note()
        return function(*args, **(kwargs or {}))

    def note(self) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        if "/weakclip/" in frames[-3].filename:  # the last two are those of this class
            self.places[f"{frames[-3].filename}:{frames[-3].lineno}"] += 1


def main(path: str) -> None:
    config = recipe.load(path)
    world = World.join()
    engine = Engine(WeakCLIP(config, labels.class_names(config.classes)), jobs.refine(config), world)
    crop, generator = config.augment.crop, torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, crop, crop), dtype=torch.uint8, generator=generator)
    batch = Batch([], images, torch.ones(2, crop, crop, dtype=torch.uint8), torch.ones(2, 4), torch.zeros(2, 5), [])
    engine.train_step([batch])  # constants are made once
    reads, cpu = Reads(), torch.Tensor.cpu

    def counted(tensor, *args, **kwargs):
        reads.note()
        return cpu(tensor, *args, **kwargs)

    torch.Tensor.cpu = counted  # type: ignore[method-assign]
    with reads:
        for _ in range(2):
            losses = engine.train_step([batch])
    assert losses["total"].isfinite()
    print(dict(reads.places))


if __name__ == "__main__":
    main(sys.argv[1])
