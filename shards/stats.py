"""Run weakclip.datasets.stats from a checkout."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a checkout need not be installed

from weakclip import cli
from weakclip.datasets.stats import main

if __name__ == "__main__":
    cli.run(main)
