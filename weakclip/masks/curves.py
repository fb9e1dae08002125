"""Curves of the statistics of pseudo masks, and of masks per second, in TensorBoard."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from weakclip.masks.quality import Quality

EVERY = 20  # masks between two points of a curve


class Curves:
    """Writes the statistics of masks to TensorBoard, in the order in which the masks are made."""

    def __init__(self, folder: Path, made: int) -> None:
        """made: number of masks that exist already; the curves continue from there.

        `labelled` and `with_unlabelled_class` count the masks of which weakclip.masks.quality.Quality says so.
        """
        self._board = SummaryWriter(str(folder), purge_step=made + 1)
        self._step, self._since, self._recent = made, time.perf_counter(), list[Quality]()
        self._begin, self._all = self._since, list[tuple[int, int]]()
        self.labelled = self.with_unlabelled_class = 0

    def add(self, quality: Quality) -> None:
        """Add the statistics of the next mask. Every 20 masks are one point of the curves."""
        self._recent.append(quality)
        self._all.append((quality.seeded, quality.agreeing))
        self.labelled += quality.labelled
        self.with_unlabelled_class += quality.unlabelled_class
        self._step += 1
        if len(self._recent) == EVERY:
            self._write()

    def close(self) -> str:
        """Write the last points, and return one line about all masks."""
        if self._recent:
            self._write()
        self._board.close()
        number, seconds = len(self._all), time.perf_counter() - self._begin
        line = f"{number} masks, {number / seconds:.2f} images/s"
        shares = [agreeing / seeded for seeded, agreeing in self._all if seeded]
        return f"{line}, {100 * np.mean(shares):.1f} % of seeded pixels agree on average" if shares else line

    def _write(self) -> None:
        now, recent = time.perf_counter(), self._recent
        self._board.add_scalar("images_per_second", len(recent) / (now - self._since), self._step)
        self._board.add_scalar("entropy", np.mean([quality.entropy for quality in recent]), self._step)
        shares = [quality.agreeing / quality.seeded for quality in recent if quality.seeded]
        if shares:
            self._board.add_scalar("seed_agreement_percent", 100 * np.mean(shares), self._step)
        self._classes(np.sum([quality.pixels_K for quality in recent], axis=0))
        self._board.flush()
        self._since, self._recent = now, []

    def _classes(self, pixels_K: np.ndarray) -> None:
        """Write the share of pixels of each class, as a histogram whose bucket k is class k."""
        shares_K, classes_K = pixels_K / pixels_K.sum(), np.arange(len(pixels_K))
        self._board.add_histogram_raw(
            "classes", 0, len(shares_K) - 1, 1.0, float(shares_K @ classes_K), float(shares_K @ classes_K**2),
            bucket_limits=(classes_K + 0.5).tolist(), bucket_counts=shares_K.tolist(), global_step=self._step,
        )  # fmt: skip
