"""What submitit pickles, and runs in each task of a job."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from submitit.helpers import DelayedSubmission

from weakclip import config as configs
from weakclip.stages import STAGES


@dataclass(frozen=True)
class StageJob:
    """One stage, or one part of it. It goes on with whatever earlier runs of it have left.

    config: the resolved recipe. part: the shards "A:B" of an array's task. requeues: how often it may still begin anew by itself.
    """

    stage: str
    config: Path
    part: str | None
    requeues: int

    def __call__(self) -> None:
        from weakclip.runtime.signals import (  # with torch, which takes seconds that no one needs to wait who submits
            Interrupted,
            nothing_left_to_save,
        )

        # submitit's handler of USR2: rank 0 calls checkpoint(), puts the job into the queue again and ends. A training replaces
        # it, so as to save first, and comes back to it.
        begin_anew = signal.getsignal(signal.SIGUSR2)
        try:
            STAGES[self.stage].run(configs.load(self.config), self.part)
        except Interrupted as stop:
            if stop.signal is signal.SIGUSR2 and callable(begin_anew):
                begin_anew(signal.SIGUSR2, None)  # rank 0 doesn't come back
            # Slurm is going to end this process. Who ends before makes Slurm end rank 0, maybe too early.
            # And a job that SIGTERM told to make room begins anew only if it waits for its end.
            time.sleep(600 if "SLURM_JOB_ID" in os.environ else 0)
            sys.exit(os.EX_TEMPFAIL)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)
        nothing_left_to_save()

    def checkpoint(self) -> DelayedSubmission:
        """The job as it begins anew."""
        if self.requeues == 0:
            print("error: not put into the queue again: `requeues` are used up; submit the stage again to go on", file=sys.stderr)
            sys.exit(1)
        return DelayedSubmission(replace(self, requeues=self.requeues - 1))
