"""Work that one rank of a job does while the others wait, such as a download."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def on_first(work: Callable[[], Result]) -> Result:
    """Return what `work` returns on rank 0, on every rank; the others wait. An exception of rank 0 is raised on every rank.

    In a process that has not joined others, this only calls `work`. The result is pickled.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return work()
    outcome: list[tuple[Result | None, Exception | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(work(), None)]
        except Exception as error:  # raised below, here too
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]
