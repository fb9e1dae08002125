"""Stopping all ranks at the same step: whichever rank a signal reaches, all ranks learn of it at the next step boundary."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from weakclip.runtime.signals import SIGNALS


class Interruption:
    """Notes a first signal; a second one has its usual effect, for whoever cannot wait for the checkpoint."""

    def __init__(self) -> None:
        """Every rank must make one, in its main thread, after it has joined the others."""
        self._asked = 0
        # A group of its own on the CPU: asking costs the hosts a round trip, and never waits for the device.
        self._group = dist.new_group(backend="gloo")
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._asked = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def agreed(self) -> int:
        """The signal that any rank has got, on all ranks; 0 if none has. Every rank must call it after each step."""
        asked = torch.tensor(self._asked)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
        return int(asked)
