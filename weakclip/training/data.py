"""The shard sets of a training job. Importing this module is light, so that their mistakes are found before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from weakclip.data.index import Index, open_index
from weakclip.training.jobs import Job


@dataclass(frozen=True)
class TrainingData:
    """The shard sets that a job trains and validates on."""

    sets: tuple[Index, ...]
    """`data.train`, then the sets of `data.mix` in its order."""
    validation: Index | None
    """`data.val`."""

    @classmethod
    def open(cls, job: Job) -> TrainingData:
        """Open the sets of a job. Raises UserError when one is missing or has another class list."""
        data = job.data
        sets = tuple(open_index(path, job.names, data) for path in (data.train, *data.mix))
        return cls(sets, open_index(data.val, job.names, data) if data.val else None)
