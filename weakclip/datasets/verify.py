"""Check a shard set: each shard's SHA-256, its members against the index, that every sample decodes, and that its parts agree.

weakclip verify shards_train
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from weakclip.data.index import Index, ShardError, sha256
from weakclip.data.reading import read_entry
from weakclip.data.sample import decode_sample
from weakclip.datasets.findings import Findings
from weakclip.runtime.command_line import Parser, run
from weakclip.runtime.workers import map_in_processes

_log = logging.getLogger(__name__)


def verify_shard(index: Index) -> tuple[list[str], Findings]:
    """Return the problems of the only shard in `index`, one line each, and what disagrees in its samples."""
    (shard,), problems, members, findings = index.shards, [], [], Findings()
    if (digest := sha256(index.root / shard.name)) != shard.sha256:
        problems.append(f"{shard.name}: SHA-256 is {digest}, but the index has {shard.sha256}; copy or build it again")
    for entry in shard.samples:
        try:
            parts = read_entry(index, entry)
            members += [f"{entry.key}.{extension}" for extension in parts]
            findings.add(decode_sample(parts, entry, len(index.classes)), parts, index.classes)
        except ShardError as error:
            problems.append(str(error))
    try:
        with tarfile.open(index.root / shard.name, "r:") as archive:
            if archive.getnames() != members:
                problems.append(f"{shard.name}: its members are not those of the index; copy or build it again")
    except tarfile.TarError as error:
        problems.append(f"{shard.name}: not a tar file ({error}); copy or build it again")
    return problems, findings


def verify(index: Index, processes: int) -> tuple[list[str], Findings]:
    """Return the problems of a shard set, one line each, and what disagrees in its samples."""
    unlisted = {path.name for path in index.root.glob("*.tar")} - {shard.name for shard in index.shards}
    problems, findings = [f"{name}: not in the index; remove it" for name in sorted(unlisted)], Findings()
    alone = [replace(index, shards=(shard,)) for shard in index.shards]  # all that a worker process needs of the index
    with tqdm(total=len(index.entries), unit=" images", desc="verify") as bar:
        for shard, (found, disagreeing) in zip(index.shards, map_in_processes(verify_shard, processes, alone), strict=True):
            problems += found
            findings.merge(disagreeing)
            bar.update(len(shard.samples))
    return problems, findings


def main(arguments: Sequence[str]) -> None:
    parser = Parser(prog="weakclip verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="the shard set, a directory with an index.json")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1), help="shards checked at a time")
    parser.add_argument("--strict", action="store_true", help="labels, CAMs, seeds and masks that disagree are problems too")
    options = parser.parse_args(arguments)
    index = Index.load(options.directory)
    problems, findings = verify(index, options.processes)
    for problem in problems:
        _log.error("%s", problem)
    count = len(problems) + findings.report(options.strict)
    print(f"{options.directory}: {len(index.shards)} shards, {len(index.entries)} samples, {count} problems")
    if count:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
