"""Writing a shard set, shard by shard, by one process or many jobs. An interrupted build resumes.

An unfinished set is in OUT.partial:  build.json  shard-00000.tar  shard-00000.json  ...  (each with its part of the index).
When all shards exist, the parts become index.json, and OUT.partial is renamed to OUT: a set is complete or absent.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from weakclip.config import ConfigError
from weakclip.data.index import INDEX, Entry, Index, Shard, ShardError, parse_shard, sha256
from weakclip.data.sample import PackedSample, Sample, check_parts
from weakclip.data.storage import Storage
from weakclip.datasets.findings import Findings
from weakclip.runtime.atomic import whole, write_whole
from weakclip.runtime.workers import map_in_processes

BUILD = "build.json"
"""File in a set that a recipe made, and in OUT.partial, with `Build.provenance` and the number of shards."""

T = TypeVar("T")
Apply = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""Calls a function for each item and yields the results in order."""


@dataclass(frozen=True)
class Build(Generic[T]):
    """A shard set to make at `out`: the samples that `load` makes of `items`.

    provenance: what decides the samples beside the items, for JSON. version: item -> a string that changes when one of its
    files does. samples_per_shard: of all shards but the last, or one number for each shard. strict: what otherwise is a warning
    at the end, parts of a sample that disagree, is an error. The bytes depend on the samples and `samples_per_shard`, not on
    processes and jobs. With more than one process `items` and `load` must be picklable. Raises
    ShardError when there is nothing to write.
    """

    items: Sequence[T]
    load: Callable[[T], Sample | PackedSample]
    out: Path
    classes: Sequence[str]
    samples_per_shard: int | Sequence[int] = 256
    provenance: Mapping[str, Any] = field(default_factory=dict)
    version: Callable[[T], str] = str
    strict: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.samples_per_shard, int) and self.samples_per_shard < 1:
            raise ShardError("samples_per_shard must be at least 1")
        if not self.items:
            raise ShardError(f"{self.out}: there are no images to write")

    @property
    def shards(self) -> int:
        """Number of shards of the complete set."""
        sizes = self.samples_per_shard
        return math.ceil(len(self.items) / sizes) if isinstance(sizes, int) else len(sizes)

    def run(self, processes: int = 1, numbers: range | None = None, apply: Apply = map) -> Index | None:
        """Write those of the shards `numbers` (None: all) that are missing. Each process writes whole shards.

        apply: calls `load` for the items of a shard and yields its results in their order, such as `map`, or one with threads.
        The job that writes the last one completes the set and returns its index; while shards are missing, None is returned.
        Raises ShardError naming the image when a sample fails a check, and when `out` or OUT.partial holds something else. Errors
        of `load` pass through.
        """
        if processes < 1:
            raise ShardError("processes must be at least 1")
        numbers = range(self.shards) if numbers is None else numbers
        work = open_for_writing(self.out, {**self.provenance, "shards": self.shards})
        missing = [number for number in numbers if self._written(work, number) is None]
        chunks = [self._chunk(number) for number in missing]
        try:
            with tqdm(total=sum(map(len, chunks)), unit=" images", desc=self.out.name) as bar:
                paths = [work / f"{_name(number)}.tar" for number in missing]
                # With worker processes, samples are counted when their shard is written.
                load = self.load if processes > 1 else _counting(self.load, bar)
                write = partial(_write_shard, load, apply, self.classes, self.strict)
                made = map_in_processes(write, processes, [*zip(paths, chunks, strict=True)])
                for number, (shard, findings) in zip(missing, made, strict=True):
                    note = {"version": self._version(number), "shard": shard.as_dict(), "findings": findings.as_dict()}
                    write_whole(work / f"{_name(number)}.json", json.dumps(note) + "\n")
                    bar.update(len(shard.samples) if processes > 1 else 0)
        except BaseException:
            with _alone(work) as there:
                if there and [path.name for path in work.iterdir()] == [BUILD]:  # nothing to resume, and no other job writes
                    shutil.rmtree(work)
            raise
        return self._finish(work)

    def _chunk(self, number: int) -> Sequence[T]:
        sizes = self.samples_per_shard
        if isinstance(sizes, int):
            return self.items[number * sizes : (number + 1) * sizes]
        return self.items[sum(sizes[:number]) : sum(sizes[: number + 1])]

    def _version(self, number: int) -> str:
        """Return the hash of all that decides a shard's bytes."""
        versions = [self.version(item) for item in self._chunk(number)]
        return hashlib.sha256(json.dumps([self.provenance, self.classes, versions]).encode()).hexdigest()

    def _written(self, work: Path, number: int) -> Shard | None:
        """Return a shard that was written from the current items, else None."""
        path = work / f"{_name(number)}.json"
        try:
            note = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        return parse_shard(note["shard"], str(path)) if note["version"] == self._version(number) else None

    def _finish(self, work: Path) -> Index | None:
        with _alone(work) as there:
            if not there:  # another job has completed the set
                return Index.load(self.out)
            found = [self._written(work, number) for number in range(self.shards)]
            shards = tuple(shard for shard in found if shard is not None)
            if len(shards) < len(found):
                return None
            self._report(work)
            Index(Storage.of(work), tuple(self.classes), shards).save()
            index = Index.load(work)
            for number in range(self.shards):
                (work / f"{_name(number)}.json").unlink()
            if not self.provenance:
                (work / BUILD).unlink()
            work.rename(self.out)
        return replace(index, storage=Storage.of(self.out))

    def _report(self, work: Path) -> None:
        """Log what was found in the samples. Raises ShardError for disagreements if they are errors."""
        findings = Findings()
        for number in range(self.shards):
            note = json.loads((work / f"{_name(number)}.json").read_text())
            findings.merge(Findings.from_dict(note.get("findings", {})))  # an earlier version noted none
        if self.strict and (disagreements := findings.disagreements()):
            raise ShardError(f"--strict: {disagreements[0]}")
        findings.report(strict=False)


def build_shards(
    items: Sequence[T],
    load: Callable[[T], Sample | PackedSample],
    out: str | Path,
    classes: Sequence[str],
    samples_per_shard: int = 256,
    processes: int = 1,
) -> Index:
    """Write a set that is not resumed: a build that fails leaves nothing behind. Raises what `Build` raises."""
    build = Build(items, load, Path(out).resolve(), classes, samples_per_shard)
    if partial_folder(build.out).exists():
        message = "a build is running, or one was killed; if none is running, remove this directory and build again"
        raise ShardError(f"{partial_folder(build.out)}: {message}")
    try:
        index = build.run(processes)
    except BaseException:
        shutil.rmtree(partial_folder(build.out), ignore_errors=True)
        raise
    assert index is not None
    return index


def partial_folder(out: Path) -> Path:
    """Return the folder of an unfinished set."""
    return out.with_name(out.name + ".partial")


def read_provenance(out: Path) -> dict[str, Any] | None:
    """Return the content of BUILD in the set `out`, or in OUT.partial while the set is unfinished; None without that file."""
    note = (out if (out / INDEX).is_file() else partial_folder(out)) / BUILD
    return json.loads(note.read_text()) if note.is_file() else None


def written(out: Path, about: Mapping[str, Any], key: str, by: str) -> tuple[int, int] | None:
    """Return the number of existing shards of the set with provenance `about`, and of all; None where it was not started.

    key: the recipe's key that names `out`. by: the key that decides what is made. Raises ConfigError when `out` or OUT.partial
    holds something else.
    """
    whole, earlier = (out / INDEX).is_file(), read_provenance(out)
    folder = out if whole else partial_folder(out)
    if earlier is None:
        if whole:
            raise ConfigError(f"{key}: {out} was not made by {by}; remove it, or leave {by} out")
        return None
    if earlier | dict(about) != earlier:
        raise ConfigError(f"{key}: {folder} was made with another {by} (see {BUILD} in it); remove it, or change {key}")
    return earlier["shards"] if whole else len([*folder.glob("shard-*.json")]), earlier["shards"]


def open_for_writing(out: Path, about: Mapping[str, Any]) -> Path:
    """Create the folder OUT.partial, or check that it belongs to the same build, and return it.

    Raises ShardError when it belongs to another build, or `out` is in use.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ShardError(f"{out}: already holds files; remove it, or choose another directory")
    work = partial_folder(out)
    work.mkdir(parents=True, exist_ok=True)
    with _alone(work):
        if (work / BUILD).exists():
            if json.loads((work / BUILD).read_text()) != json.loads(json.dumps(about)):
                raise ShardError(f"{work}: holds another unfinished build (see {BUILD} in it); remove it to start again")
        elif any(work.iterdir()):
            raise ShardError(f"{work}: holds files that are not an unfinished build; remove it to start again")
        else:
            write_whole(work / BUILD, json.dumps(about) + "\n")
    return work


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Hold the lock of a folder, so that concurrent jobs take turns. Gives False where the folder no longer exists."""
    try:
        directory = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield folder.is_dir()
    finally:
        os.close(directory)


def _name(number: int) -> str:
    return f"shard-{number:05d}"


def _counting(load: Callable[[T], Sample | PackedSample], bar: Any) -> Callable[[T], Sample | PackedSample]:
    def counted(item: T) -> Sample | PackedSample:
        sample = load(item)
        bar.update()
        return sample

    return counted


def _write_shard(
    load: Callable[[T], Sample | PackedSample],
    apply: Apply,
    classes: Sequence[str],
    strict: bool,
    work: tuple[Path, Sequence[T]],
) -> tuple[Shard, Findings]:
    from webdataset.writer import TarWriter  # imports torch, which readers of shards do not need

    (path, items), entries, findings = work, [], Findings()
    with whole(path) as unfinished:
        with open(unfinished, "xb") as file, TarWriter(file, user="root", group="root", mtime=0, encoder=False) as tar:
            for sample in apply(load, items):
                parts = sample.encode()
                try:
                    checked = check_parts(parts, sample.key, len(classes))
                    disagreements = findings.add(checked, parts, classes)
                    if strict and disagreements:
                        raise ShardError(f"--strict: {disagreements[0]}")
                except ShardError as error:
                    raise ShardError(f"{sample.source}: {sample.key}: {error}") from None
                start = tar.tarstream.offset
                tar.write({"__key__": sample.key, **parts})
                original = checked.name if checked.name != sample.key else None
                entries.append(Entry(path.name, sample.key, start, tar.tarstream.offset - start, original))
        return Shard(path.name, unfinished.stat().st_size, sha256(unfinished), tuple(entries)), findings
