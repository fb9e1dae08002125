"""Write pseudo masks: probabilities averaged over scales and flips, a dense CRF, one palette PNG per image.

weakclip pseudo --config configs/voc.yaml [--weights best] [--data DIR] [--shards 0:8] [--out DIR] [key=value ...]
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from weakclip import cli, registry
from weakclip.config import Config
from weakclip.data.index import Index, open_index
from weakclip.runtime.command_line import output_folder, shard_set
from weakclip.training import jobs
from weakclip.training.jobs import Job

_log = logging.getLogger(__name__)


def run(config: Config, data: str, weights: Path, out: Path, shards: str | None = None) -> None:
    """Write the masks of the samples in `shards` of the shard set `data` into `out`, by WeakCLIP with these weights."""
    job = jobs.refine(config)
    write(job, open_index(data, job.names, config.data), shards, weights, out)


def run_part(config: Config, part: str | None) -> None:
    """Run the stage `pseudo`: write the masks of the shards "A:B" by the run's best weights into the run."""
    run(config, config.data.train, config.run_dir.find_weights("best"), config.run_dir.pseudo, part)


def write(job: Job, index: Index, part: str | None, weights: Path, out: Path) -> None:
    """Write the masks of the shards "A:B" by the network of a job into `out`; existing masks are kept.

    It counts those masks of WeakCLIP that have a class which their image is not labelled with.
    """
    write_part = registry.load("weakclip.masks.writing:write_part")
    predictor = partial(registry.load("weakclip.training.tasks:predictor_of"), job, weights)
    made = write_part(predictor, job.mask_settings, index, part, weights, out, job.run.tensorboard)
    if made and made.with_unlabelled_class and job.name == "train":
        _log.info(
            "masks of %d of %d labelled images have a class that the image is not labelled with; pseudo.restrict_to_labels=true "
            "gives such pixels to the image's labels or the background",
            made.with_unlabelled_class,
            made.labelled,
        )


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(prog="weakclip pseudo", description="Write pseudo masks.")
    parser.add_argument("--weights", default="best", metavar="best|last|FILE", help="which weights (default: best)")
    parser.add_argument("--data", type=shard_set, metavar="DIR", help="shard set (default: data.train)")
    parser.add_argument("--shards", metavar="N|A:B", help="only these shards of it")
    parser.add_argument("--out", type=output_folder, metavar="DIR", help="where the masks go (default: RUN/pseudo)")
    config, options = cli.parse_config(parser, arguments)
    out = options.out or config.run_dir.pseudo
    run(config, options.data or config.data.train, config.run_dir.find_weights(options.weights), out, options.shards)
    print(f"masks: {out}")


if __name__ == "__main__":
    cli.run(main)
