"""Run weakclip.datasets.show from a checkout."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a checkout need not be installed

from weakclip.runtime.environment import run

if __name__ == "__main__":
    run("weakclip.datasets.show:main")
