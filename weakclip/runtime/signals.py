"""Signals that ask a job to stop, and which of its processes react to them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""SIGUSR2 is what Slurm and submitit send before a preemption or a time-out, SIGTERM what everything else sends."""


class Interrupted(Exception):
    """The job received `signal`, and has written a checkpoint."""

    def __init__(self, number: int, step: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"{self.signal.name}: saved at step {step}; resume with --resume auto")


@contextmanager
def held_back() -> Iterator[None]:
    """Block SIGNALS until this context ends. Processes that start in it have them blocked from the beginning."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def nothing_left_to_save() -> None:
    """Block SIGNALS once the work is done: a signal that arrives while Python exits would make the process and its job fail."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def obey_only_the_parent(_worker: int) -> None:
    """Make a loader process, which was started in `held_back`, ignore SIGNALS that its parent did not send.

    Slurm signals every process of a job. A loader process would die of it, and then its rank would die before it has saved.

    A signal from the rank itself still ends the process; multiprocessing sends one when the rank ends.
    """
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # processes that are not forked do not inherit it

    def wait() -> None:
        while signal.sigwaitinfo(SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
