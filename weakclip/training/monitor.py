"""Reporting of a training job: TensorBoard, metrics.jsonl, a progress bar on a terminal, and log lines."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from weakclip.config import ConfigError
from weakclip.data.stream import Batch, too_many_bad
from weakclip.runtime import compilation
from weakclip.runtime.atomic import write_whole
from weakclip.training import flops
from weakclip.training.engine import Engine
from weakclip.training.jobs import Job

_log = logging.getLogger(__name__)


class Monitor:
    """Reports a training. Every rank creates one and calls it in the same way; only rank 0 writes.

    It reads from the device, which synchronises, only when it logs.
    """

    def __init__(self, job: Job, engine: Engine) -> None:
        self.job, self.engine = job, engine
        self.bad: dict[str, None] = {}  # messages about unreadable samples, in order of appearance
        self._told = 0
        self._losses: list[dict[str, Tensor]] = []
        self._first = compilation.is_on()  # a step that compiles takes minutes, and is left out of the rate
        self._steps = 0
        self._peak = flops.peak(engine.world.device)
        self._flops = flops.per_image(engine.plain, job.augment.crop, job.train.batch) if self._peak else 0
        self._since = time.perf_counter()
        self._waited = 0.0
        self.leader = engine.world.rank == 0
        if self.leader:
            self._board = SummaryWriter(str(job.run.tensorboard), purge_step=engine.step + 1)
            self._lines = job.run.metrics
            _drop_lines_after(self._lines, engine.step)
            if not self._lines.exists() or not self._lines.stat().st_size:  # a resumed run has this line already
                trainable = sum(p.numel() for p in engine.plain.parameters())
                self.write({"parameters/trainable": trainable, "parameters/total": trainable + engine.plain.frozen})
            terminal = sys.stderr.isatty()
            self._bar = tqdm(total=job.train.steps, initial=engine.step, unit="step", disable=not terminal, smoothing=0.1)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the time inside as time waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def step(self, batches: Sequence[Batch], losses: dict[str, Tensor]) -> None:
        """Count a step. Every `train.log_every` steps, and at the last one, write the metrics since the previous time.

        Raises ConfigError, on every rank, when more samples were unreadable than `data.max_bad_samples` allows.
        """
        self._losses.append(losses)
        self._steps += 1
        self.bad |= dict.fromkeys(message for batch in batches for message in batch.bad)
        if self.leader:
            self._bar.update()
        if self.engine.step % self.job.train.log_every == 0 or self.engine.step == self.job.train.steps:
            self._log()
        elif self._first:
            losses["total"].item()  # waits for the device
            _log.info("first step: %.0f s", time.perf_counter() - self._since)
            self._restart_clock()
        self._first = False

    def _log(self) -> None:
        engine = self.engine
        means = {name: torch.stack([losses[name] for losses in self._losses]).mean().item() for name in self._losses[0]}
        seconds = time.perf_counter() - self._since
        reports = engine.world.gather((means, self._waited / seconds, list(self.bad)))
        self.bad |= dict.fromkeys(message for report in reports for message in report[2])
        values = {f"loss/{name}": float(np.mean([report[0][name] for report in reports])) for name in means}
        values["lr"] = engine.lr
        values["gradient_norm"] = engine.gradient_norm
        values["images_per_second"] = self._steps * engine.global_batch / seconds
        if self._peak:
            values["mfu_percent"] = 100 * self._flops * values["images_per_second"] / (engine.world.ranks * self._peak)
        values["data_wait_percent"] = 100 * float(np.mean([report[1] for report in reports]))
        values["memory_gib"] = _memory_gib(engine.world.device)
        values["bad_samples"] = len(self.bad)
        if self.leader:
            for message in list(self.bad)[self._told :]:
                _log.warning("skipped: %s", message)
            self._told = len(self.bad)
            self.write(values)
            _log.info(self._progress(values, seconds / self._steps))
        self._losses.clear()
        self._restart_clock()
        if len(self.bad) > self.job.data.max_bad_samples:
            raise ConfigError(too_many_bad(list(self.bad), self.job.data.max_bad_samples))

    def _restart_clock(self) -> None:
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def write(self, values: dict[str, float]) -> None:
        """Write values as one line of metrics.jsonl and as points in TensorBoard. Rank 0 only."""
        for name, value in values.items():
            self._board.add_scalar(name, value, self.engine.step)
        with self._lines.open("a") as file:
            file.write(json.dumps({"step": self.engine.step, "time": round(time.time(), 3), **values}) + "\n")

    def show(self, name: str, picture: Image.Image) -> None:
        """Write an image to TensorBoard. Rank 0 only."""
        self._board.add_image(name, np.asarray(picture), self.engine.step, dataformats="HWC")

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Leave the time inside (a validation, a checkpoint) out of the step rate."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def close(self) -> None:
        if self.leader:
            self._board.close()
            self._bar.close()

    def _progress(self, values: dict[str, float], seconds_per_step: float) -> str:
        left = timedelta(seconds=round((self.job.train.steps - self.engine.step) * seconds_per_step))
        parts = " ".join(f"{name.removeprefix('loss/')} {value:.3f}" for name, value in values.items() if "loss/" in name)
        return (
            f"step {self.engine.step}/{self.job.train.steps}  {parts}  lr {values['lr']:.1e}  "
            f"{values['images_per_second']:.1f} images/s  data wait {values['data_wait_percent']:.0f} %  ETA {left}"
        )


def _memory_gib(device: torch.device) -> float:
    """Return the peak memory in GiB so far: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines that an interrupted run wrote after its last checkpoint, an incomplete last line included."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        write_whole(path, "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))
