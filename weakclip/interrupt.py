"""A signal to stop: whichever rank it reaches, all ranks hear of it at the same step boundary."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""What Slurm and submitit send before a preemption or a time-out, and what everybody else sends."""


class Interrupted(Exception):
    """The job was told to stop by `signal`, and has written a checkpoint."""

    def __init__(self, number: int, step: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"{self.signal.name}: saved at step {step}; go on by --resume auto")


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


@contextmanager
def held_back() -> Iterator[None]:
    """SIGNALS come after this, and processes that begin meanwhile have them blocked from their first moment."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def nothing_left_to_save() -> None:
    """For a process whose work is done: as Python ends, a signal that comes late would make it, and so its job, a failed one."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def obey_only_the_parent(_worker: int) -> None:
    """For a loader's process, begun in `held_back`.

    Slurm signals every process of a job: a loader's would die of it, and its rank before it has saved.

    What the rank itself sends still ends the process, as multiprocessing does when the rank ends.
    """
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # where processes are not forked, they have not inherited it

    def wait() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
