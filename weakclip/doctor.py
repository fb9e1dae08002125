"""Check what a run needs: libraries, GPUs, Slurm, disk, shared memory; with a recipe also its weights, shards and run.

weakclip doctor
weakclip doctor --config configs/voc.yaml [--json] [key=value ...]
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain as chain_of
from pathlib import Path
from typing import NamedTuple

from weakclip import cli, registry
from weakclip.checkpoints.clip_files import is_name
from weakclip.config import Config
from weakclip.data import shared_memory
from weakclip.data.index import open_index
from weakclip.labels import class_names
from weakclip.runtime import lock
from weakclip.runtime.command_line import Parser, run
from weakclip.runtime.errors import is_user_error, one_line
from weakclip.stages import chain
from weakclip.training import deepspeed_file
from weakclip.training.jobs import JOBS, Job, check_crop

LIBRARIES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "deepspeed": "deepspeed",
    "open_clip_torch": "weakclip.models.architectures:open_clip",
    "webdataset": "webdataset",
    "pydensecrf2": "pydensecrf.densecrf",
    "pycocotools": "pycocotools.mask",
    "submitit": "submitit",
    "tensorboard": "tensorboard",
}
"""Distributions that the package stands on, and the import path of something in each, as in weakclip.registry."""

GIB = 2**30


class Check(NamedTuple):
    """One line of the report."""

    name: str
    state: str
    """ok, note (nothing is wrong, but it decides what is possible) or wrong."""
    text: str
    """What was found, and what to do where it is wrong."""


# ----------------------------------------------------------------------------------------------------------- this machine


def machine() -> Iterator[Check]:
    """Check the machine and the environment, whatever the recipe."""
    yield Check("python", "ok", f"{platform.python_version()} at {sys.executable}")
    with suppress(Exception):  # a broken torch is reported below
        registry.load("weakclip.runtime.torchvision_ops:declare_missing")()
    for name, module in LIBRARIES.items():
        yield _library(name, module)
    yield from _gpus()
    yield _slurm()
    yield _attempt("shared memory", _shared_memory)


def _library(name: str, module: str) -> Check:
    try:
        registry.load(module)
        return Check(name, "ok", version(name))
    except PackageNotFoundError:
        return Check(name, "ok", f"{module}, of another distribution")
    except Exception as error:  # a broken installation may raise anything
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        return Check(name, "wrong", f"cannot be imported ({reason}); install it again: pip install --force-reinstall {name}")


def _gpus() -> Iterator[Check]:
    try:
        torch = registry.load("torch")
    except Exception:  # reported as a library
        return
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this build of torch has no CUDA"
        yield Check("GPUs", "note", f"none, and {built}: everything runs on the CPU, a hundred times slower")
        return
    names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Check("GPUs", "ok", f"{torch.cuda.device_count()} ({names}), CUDA {torch.version.cuda}, NCCL {nccl}")
    if not torch.cuda.is_bf16_supported():
        yield Check("bf16", "note", "these GPUs do not compute in bf16; set precision=fp32 where memory allows")


def _slurm() -> Check:
    if shutil.which("sbatch") is None or shutil.which("sinfo") is None:
        return Check("Slurm", "note", "none on this machine: weakclip submit runs the stages here, one after the other")
    asked = subprocess.run(["timeout", "20", "sinfo", "--noheader", "--format=%P %a %l"], capture_output=True, text=True)
    if asked.returncode:
        said = asked.stderr.strip().partition("\n")[0]
        return Check("Slurm", "note", f"it does not answer ({said}): weakclip submit runs the stages here, one after the other")
    partitions = "; ".join(" ".join(line.split()) for line in asked.stdout.splitlines())
    return Check("Slurm", "ok", f"partitions (name, state, time limit): {partitions}")


def _shared_memory() -> str:
    folder = shared_memory.FOLDER
    if not folder.is_dir():
        return f"this system has no {folder}"
    shared_memory.require(GIB)
    return f"{folder} has {shutil.disk_usage(folder).total / GIB:.1f} GiB"


# ------------------------------------------------------------------------------------------------------------- the recipe


def of_recipe(config: Config) -> Iterator[Check]:
    """Check the class list, the weights, the shard sets, the disk and the lock of a recipe."""
    names = class_names(config.classes)
    yield Check("classes", "ok", f"{len(names) - 1} and background")
    stages = [stage.name for stage in chain(config)]
    if "train" in stages or ("cam" in stages and config.cam.source == "clip"):
        yield _clip(config)
    for name in [stage for stage in stages if stage in JOBS]:
        yield _attempt(f"stage {name}", partial(_check_job, JOBS[name], config))
    data = config.data
    made = {data.train: "the stage cam makes it"} if data.labelled else {}
    if data.build.source is not None:
        made[data.built] = "the stage shards builds it"
    sets = {"data.labelled": data.labelled, "data.train": data.train, "data.val": data.val}
    sets |= {f"data.mix: {path}": path for path in data.mix}
    for key, path in sets.items():
        if path is not None:
            yield _shards(key, path, config, names, made.get(path))
    yield _disk(config)
    yield _attempt("run", lambda: _free(config))


def _clip(config: Config) -> Check:
    key, pretrained = "clip.pretrained", config.clip.pretrained
    if is_name(pretrained):  # finding out more would download it
        return Check(key, "note", f"{pretrained}: open_clip downloads it, unless it is in the cache, when it is first used")
    return _attempt(key, lambda: _load_clip(config))


def _load_clip(config: Config) -> str:
    clip = registry.load("weakclip.models.clip:FrozenClip")(config.clip, prompts=config.prompts.length)
    clip.normalisation("clip.normalisation", config.clip.normalisation)
    return f"{config.clip.pretrained}: a ViT of width {clip.vision.width} with patch {clip.vision.patch}"


def _check_job(job_of: Callable[[Config], Job], config: Config) -> str:
    job = job_of(config)
    check_crop(job)
    deepspeed_file.read(job.train, job.prefix)
    return f"{job.train.steps} steps of {job.train.batch} images a rank, {job.train.deepspeed}"


def _shards(key: str, path: str, config: Config, names: Sequence[str], made: str | None) -> Check:
    if made is not None and not Path(path).exists():
        return Check(key, "note", f"{path} does not exist yet: {made}")
    return _attempt(key, lambda: f"{path}: {len(open_index(path, names, config.data).entries)} images")


def _disk(config: Config) -> Check:
    root = Path(config.run).absolute()
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    state, cure = ("ok", "") if free > 10 * GIB else ("wrong", "; a run needs some 10 GiB: free some, or set run to another disk")
    return Check("disk", state, f"{free / GIB:.1f} GiB free at {place}{cure}")


def _free(config: Config) -> str:
    lock.check(config.run_dir)
    return f"{config.run}: no process works on it"


def _attempt(name: str, find: Callable[[], str]) -> Check:
    """Return what `find` finds, or its user error, or which library it lacks."""
    try:
        return Check(name, "ok", find())
    except ImportError as error:
        return Check(name, "wrong", f"cannot be checked ({error})")
    except Exception as error:
        if not is_user_error(error):
            raise
        return Check(name, "wrong", one_line(error).removeprefix(f"{name}: "))


def main(arguments: Sequence[str]) -> None:
    parser = Parser(prog="weakclip doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", metavar="FILE", help="a recipe to check, too")
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the recipe, such as run=runs/mine")
    options = parser.parse_intermixed_args(list(arguments))
    if options.overrides and not options.config:
        parser.error(f"{options.overrides[0]} changes a recipe; give one with --config")
    given = [part for file in options.config or () for part in ("--config", file)]
    config = cli.parse_config(Parser(), [*given, *options.overrides])[0] if given else None
    checks: list[Check] = []
    for check in chain_of(machine(), of_recipe(config) if config else ()):
        checks.append(check)
        if not options.json:
            print(f"{check.state:<5}  {check.name:<16}  {check.text}", flush=True)
    if options.json:
        print(json.dumps([check._asdict() for check in checks], indent=1))
    if wrong := [check for check in checks if check.state == "wrong"]:
        sys.exit(f"{len(wrong)} of {len(checks)} checks are wrong")


if __name__ == "__main__":
    run(main)
