"""Measure weak scaling: the same batch a rank, on more and more ranks of this machine.

    python benchmarks/scaling.py --config runs/demo/config.yaml --ranks 1 2 --steps 40

Each rank has one core of a CPU, with its loader, or one GPU. The rate is the median of the run's own images a second, without
the first line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from weakclip import cli, recipe
from weakclip.config import ConfigError
from weakclip.runtime.command_line import output_file
from weakclip.runtime.tables import Table


@contextmanager
def cores(number: int) -> Iterator[None]:
    """Restrict this process, and those that it starts, to a number of cores, unless there are GPUs."""
    every = os.sched_getaffinity(0)
    if not torch.cuda.is_available():
        os.sched_setaffinity(0, sorted(every)[:number])
    try:
        yield
    finally:
        os.sched_setaffinity(0, every)


def rate(config: Path, ranks: int, steps: int, run: Path) -> float:
    """Return the images a second of a training on that many ranks. Raises ConfigError when it fails."""
    never = 1_000_000
    overrides = [f"run={run}", f"train.steps={steps}", "train.log_every=5"]
    overrides += [f"train.validate_every={never}", f"train.checkpoint_every={never}"]
    module = ["-m", "weakclip.train", "--config", str(config), *overrides]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with cores(ranks):
        done = subprocess.run([*torchrun, *module], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise ConfigError(f"the training on {ranks} ranks failed: {done.stderr.strip().splitlines()[-1]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([line["images_per_second"] for line in lines if "images_per_second" in line][1:])


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of ranks (default: 1 and 2, or 1, 2, 4, 8 GPUs)")
    parser.add_argument("--steps", type=int, default=40, help="steps of each training")
    parser.add_argument("--rounds", type=int, default=3, help="trainings of each, alternating; the table has their medians")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures")
    config, options = cli.parse_config(parser, arguments)
    default = [ranks for ranks in (1, 2, 4, 8) if ranks <= (torch.cuda.device_count() or 2)]
    ranks = options.ranks or default
    rates: dict[int, list[float]] = {number: [] for number in ranks}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        recipe.save(config, file)
        for turn in range(options.rounds):
            for number in ranks:
                rates[number].append(rate(file, number, options.steps, Path(folder, f"{number}-{turn}")))
    medians = {number: statistics.median(found) for number, found in rates.items()}
    one = medians[ranks[0]] / ranks[0]
    rows = [(number, found, 100 * found / number / one) for number, found in medians.items()]
    print(Table("", ("ranks", "images/s", "efficiency (%)"), rows, digits=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"images_per_s": medians, "all": rates}, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
