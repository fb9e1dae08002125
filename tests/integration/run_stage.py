"""Runs one stage of a saved recipe, as its job does: STAGE CONFIG."""

from __future__ import annotations

import sys
from pathlib import Path

from weakclip.launch.job import StageJob

if __name__ == "__main__":
    stage, config = sys.argv[1:]
    StageJob(stage, Path(config), part=None, requeues=0)()
