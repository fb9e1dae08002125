"""Draw training batches on a rank, as training does, and log each sample's key and a hash of its tensors."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from functools import partial
from itertools import islice
from pathlib import Path

from weakclip import cli, labels
from weakclip.data.index import open_index
from weakclip.data.stream import StreamSettings, training_batches
from weakclip.masks.seeds import seed_mask


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("consumed", type=int)
    parser.add_argument("steps", type=int)
    config, options = cli.parse_config(parser, arguments)
    names = labels.class_names(config.classes)
    index, mixed = open_index(config.data.train, names), [open_index(path, names) for path in config.data.mix]
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    first = options.consumed // (config.train.batch * ranks)
    batches = training_batches(
        index, StreamSettings.of(config), partial(seed_mask, config=config.seeds), options.consumed, rank, ranks, mixed
    )
    with (options.folder / f"rank-{rank}.jsonl").open("a") as file:
        for step, batch in enumerate(islice(batches, options.steps - first), first):
            samples = zip(batch.keys, batch.images, batch.seeds, batch.photometric, strict=True)
            noted = [(key, [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in tensors]) for key, *tensors in samples]
            file.write(json.dumps([step, noted]) + "\n")
            file.flush()


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
