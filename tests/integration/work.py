"""What the tests leave to other processes, which import nothing else for it."""

from __future__ import annotations

import os
import signal


def square(number: int) -> int:
    if number < 0:
        raise OSError(28, "No space left on device", f"{number}.png")
    return number * number


def process_and_square(number: int) -> tuple[int, int]:
    return os.getpid(), square(number)


def die(_number: int) -> None:
    os._exit(3)


def process_and_signals(_number: int) -> tuple[int, set]:
    return os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, [])
