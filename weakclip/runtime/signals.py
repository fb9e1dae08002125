"""Signals that ask a job to stop, and which processes of the job obey them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""What Slurm and submitit send before a preemption or a time-out, and what everybody else sends."""


class Interrupted(Exception):
    """The job was told to stop by `signal`, and has written a checkpoint."""

    def __init__(self, number: int, step: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"{self.signal.name}: saved at step {step}; resume with --resume auto")


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
