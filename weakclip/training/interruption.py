"""Stopping all ranks at the same step: when a signal reaches any rank, all ranks learn of it at the next step boundary."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from weakclip.runtime.signals import SIGNALS


class Interruption:
    """Handler that records the first signal. A second one has its usual effect, for users who cannot wait for the checkpoint."""

    def __init__(self) -> None:
        """Install the handlers. Every rank must call it, in its main thread, after it has joined the others."""
        self._asked = 0
        # A separate group on the CPU: asking costs one round trip between hosts and never waits for the device.
        self._group = dist.new_group(backend="gloo")
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._asked = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def agreed(self) -> int:
        """Return on all ranks the signal that any rank received, 0 if none did. Every rank must call it after each step."""
        asked = torch.tensor(self._asked)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
        return int(asked)
