"""Score masks, seeds or CAMs against the ground truth in a shard set.

weakclip evaluate --config configs/voc.yaml [--what masks|seeds|cam|cam_crf] [--data DIR] [--shards 0:8] [key=value ...]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from weakclip import cli, labels, registry
from weakclip.config import Config, ConfigError
from weakclip.data.index import Entry, Index, open_index, select_shards
from weakclip.data.sample import DecodedSample
from weakclip.evaluation import score_files
from weakclip.evaluation.metrics import Scores
from weakclip.evaluation.score_files import Scored
from weakclip.masks import mask_folder
from weakclip.runtime.command_line import input_folder, output_file, shard_set


def run(config: Config, what: str, data: str, shards: str | None, folder: Path) -> Scores:
    """Return the scores of "masks" (those in `folder`), "seeds", "cam" or "cam_crf" on `shards` of the shard set `data`."""
    names = labels.class_names(config.classes)
    index = open_index(data, names, config.data)
    samples = _samples(index, select_shards(index, shards), config.data.workers)
    scoring = registry.load("weakclip.evaluation.scoring")
    if what in ("cam", "cam_crf"):
        if what == "cam_crf" and config.pseudo.crf is None:
            raise ConfigError("pseudo.crf is null; set it to the CRF that --what cam_crf applies")
        found = scoring.best_cam_threshold(samples, names)
        print(f"best threshold {found.threshold}; threshold:mIoU (%):\n{found.curve_text()}")
        if what == "cam_crf" and config.pseudo.crf:
            settings = [config.pseudo.crf]
            return scoring.cam_crf_counts(samples, found.threshold, settings, len(names), config.pseudo.processes)[0].scores(
                names
            )
        return found
    if what == "seeds":
        return scoring.seed_scores(samples, config.seeds, names, config.pseudo.processes)
    return scoring.score(samples, lambda sample: mask_folder.read(folder, sample.name), names)


def run_part(config: Config, part: str | None) -> None:
    """Run the stage `evaluate`: score the run's masks on those of the training shards "A:B" that are not counted yet.

    The task that finds all shards counted adds the counts up.
    """
    index = open_index(config.data.train, labels.class_names(config.classes), config.data)
    score_shards(index, part, Scored.pseudo(config.run_dir), config.data.workers)


def score_shards(index: Index, part: str | None, place: Scored, workers: int) -> None:
    """Score masks on the shards "A:B" of a set, as `run_part` does. workers: processes that read samples."""
    shards = groupby(select_shards(index, part), lambda entry: entry.shard)
    for shard, entries in tqdm([(shard, list(entries)) for shard, entries in shards], "scoring", unit=" shards", disable=None):
        if place.counts(shard) is None:
            samples = _samples(index, entries, workers)
            count = registry.load("weakclip.evaluation.scoring:count")
            found = count(samples, lambda sample: mask_folder.read(place.masks, sample.name), len(index.classes))
            place.write_counts(shard, found)
    if (whole := place.add_up(index)) is not None:
        print(whole.table())


def _samples(index: Index, entries: Sequence[Entry], workers: int) -> Iterable[DecodedSample]:
    """Return the stored samples, as weakclip.data.stream.StoredSamples decodes them."""
    return registry.load("weakclip.data.stream:StoredSamples")(index, entries, workers)


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(prog="weakclip evaluate", description="Score masks, seeds or CAMs.")
    parser.add_argument(
        "--what", choices=("masks", "seeds", "cam", "cam_crf"), default="masks", help="what to score (default: masks)"
    )
    parser.add_argument("--masks", type=input_folder, metavar="DIR", help="folder of NAME.png (default: RUN/pseudo)")
    parser.add_argument("--data", type=shard_set, metavar="DIR", help="shard set with ground-truth masks (default: data.train)")
    parser.add_argument("--shards", metavar="N|A:B", help="only these shards of it")
    parser.add_argument("--out", type=output_file, metavar="FILE", help="JSON to write (default: RUN/scores-WHAT.json)")
    config, options = cli.parse_config(parser, arguments)
    folder = options.masks or config.run_dir.pseudo
    found = run(config, options.what, options.data or config.data.train, options.shards, folder)
    out = options.out or config.run_dir.scores(options.what)
    score_files.write(found, mask_folder.read_provenance(folder) if options.what == "masks" else None, out)
    print(found.table())
    print(f"written: {out}")


if __name__ == "__main__":
    cli.run(main)
