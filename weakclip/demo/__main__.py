"""Run the whole pipeline on a synthetic world.

python -m weakclip.demo --config configs/demo.yaml [demo.seed=1] [demo.size=800] [demo.seeds=exact run=runs/ceiling]
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from weakclip import cli, registry
from weakclip.runtime.tables import Table


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(prog="weakclip demo", description="Run the whole pipeline on a synthetic world.")
    config, _ = cli.parse_config(parser, arguments)
    pipeline = registry.load("weakclip.demo.pipeline")
    start, stages = time.monotonic(), pipeline.Stages()
    scores = pipeline.run(config, stages)
    print(f"{pipeline.table(scores)}\n")
    print(f"scores    {config.run}/scores.json\npictures  {config.run}/pictures.png\nmasks     {config.run}/masks/")
    print(f"curves    tensorboard --logdir {config.run}/tensorboard")
    print(f"{Table('', ('stage', 'minutes'), list(stages.minutes.items()))}")
    print(f"took {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    cli.run(main)
