"""The callable that submitit pickles and runs in each task of a job."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from submitit.helpers import DelayedSubmission

from weakclip import recipe
from weakclip.runtime import log
from weakclip.runtime.errors import is_user_error, one_line
from weakclip.runtime.signals import Interrupted, nothing_left_to_save
from weakclip.stages import STAGES

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageJob:
    """A stage, or one part of it. It resumes from the results of earlier runs.

    config: the resolved recipe. part: the shards "A:B" of an array's task. requeues: the number of requeues left.
    """

    stage: str
    config: Path
    part: str | None
    requeues: int

    def __call__(self) -> None:
        log.set_up()
        # submitit's handler of USR2: rank 0 calls checkpoint(), requeues the job and exits. A training replaces it with its own,
        # so that it can save first; the handler is called below.
        requeue = signal.getsignal(signal.SIGUSR2)
        try:
            STAGES[self.stage].run(recipe.load(self.config), self.part)
        except Interrupted as stop:
            if stop.signal is signal.SIGUSR2 and callable(requeue):
                requeue(signal.SIGUSR2, None)  # rank 0 does not return
            # Slurm will end this process. A rank that exits earlier makes Slurm end rank 0, possibly before it has requeued.
            # And a job that is preempted by SIGTERM is requeued only if it waits for its end.
            time.sleep(600 if "SLURM_JOB_ID" in os.environ else 0)
            sys.exit(os.EX_TEMPFAIL)
        except Exception as error:
            if not is_user_error(error):
                raise  # a bug, whose traceback submitit writes to the log
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
            sys.exit(1)
        nothing_left_to_save()

    def checkpoint(self) -> DelayedSubmission:
        """Return the job to requeue, with one requeue less. Exits with 1 when none is left."""
        if self.requeues == 0:
            _log.error("not requeued: `requeues` are used up; submit the stage again to resume it")
            sys.exit(1)
        return DelayedSubmission(replace(self, requeues=self.requeues - 1))
