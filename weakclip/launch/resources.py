"""Resources of a job: cluster defaults from a small YAML (configs/cluster/), overridden by options of launch/submit.py."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from weakclip.config import ConfigError
from weakclip.stages import STAGES, Stage


@dataclass
class Resources:
    """Resources of a stage. Each field but `setup`, `signal_delay` and `stages` is also an option of launch/submit.py."""

    nodes: int = 1
    """Nodes of a stage whose ranks train together; a task of an array always has one."""
    gpus_per_node: int = 8
    """GPUs per node, with one rank each; 0: one rank per node, on the CPU. A task of an array has one GPU, unless this is 0."""
    cpus_per_task: int = 8
    """CPU cores of each rank or task; its loader processes (data.workers) run on them."""
    mem: str | None = None
    """Memory per node, such as 200GB; null: the cluster's default."""
    time: str = "24:00:00"
    """Time limit in Slurm's format: minutes, hours:minutes:seconds or days-hours:minutes:seconds."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    """Nodes to avoid."""
    array_size: int = 16
    """Maximum number of tasks of an array; each takes a slice of the shards."""
    array_parallelism: int = 16
    """Maximum number of tasks of an array that run at the same time."""
    container: str | None = None
    """Container image to run in: a .sif file with Apptainer, anything else with pyxis."""
    requeues: int = 20
    """Maximum number of times that a job is requeued after preemption or its time limit."""
    signal_delay: int = 120
    """Seconds before the time limit at which the job is signalled to write its checkpoint."""
    setup: list[str] = field(default_factory=list)
    """Shell lines to run before the job, such as `module load cuda`."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Overrides for single stages: stage name -> any of the keys above."""

    def __post_init__(self) -> None:
        for name in ("nodes", "cpus_per_task", "array_size", "array_parallelism", "signal_delay"):
            _require(getattr(self, name) >= 1, f"{name} must be 1 or more")
        for name in ("gpus_per_node", "requeues"):
            _require(getattr(self, name) >= 0, f"{name} must be 0 or more")
        _require(self.minutes > 0, f"time: {self.time!r} is not a Slurm time such as 90, 12:00:00 or 2-00:00:00")
        _require(
            60 * self.minutes > self.signal_delay, f"time: {self.time} must exceed signal_delay, {self.signal_delay} seconds"
        )
        if unknown := self.stages.keys() - STAGES.keys():
            raise ConfigError(f"stages.{min(unknown)}: no such stage; the stages are {', '.join(STAGES)}")

    @classmethod
    def read(cls, file: Path | None, options: Mapping[str, Any]) -> Resources:
        """Read the YAML `file`, if any, and apply the options that are not None. Raises ConfigError naming the key at fault."""
        given = {name: value for name, value in options.items() if value is not None}
        return _merged(_merged(cls(), _read(file) if file else {}, str(file)), given, "command line")

    def of(self, stage: Stage, options: Mapping[str, Any]) -> Resources:
        """Return the resources of one stage. options: those of the command line, which take precedence."""
        given = {name: value for name, value in options.items() if value is not None}
        merged = _merged(self, self.stages.get(stage.name, {}), f"stages.{stage.name}")
        merged = _merged(merged, given, "command line")
        if stage.ranks:
            return merged
        return replace(merged, nodes=1, gpus_per_node=min(merged.gpus_per_node, 1) if stage.gpus else 0)

    @property
    def ranks_per_node(self) -> int:
        return max(self.gpus_per_node, 1)

    @property
    def minutes(self) -> int:
        """`time` in minutes, rounded up; 0 where it cannot be read."""
        found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", self.time)
        if not found:
            return 0
        days, first, second, third = (None if part is None else int(part) for part in found.groups())
        if days is not None:  # days-hours[:minutes[:seconds]]
            seconds = 86400 * days + 3600 * (first or 0) + 60 * (second or 0) + (third or 0)
        elif third is not None:  # hours:minutes:seconds
            seconds = 3600 * (first or 0) + 60 * (second or 0) + third
        else:  # minutes[:seconds]
            seconds = 60 * (first or 0) + (second or 0)
        return math.ceil(seconds / 60)

    def slurm(self, name: str, setup: Sequence[str], dependency: str | None = None) -> dict[str, Any]:
        """Return the parameters of submitit's SlurmExecutor. setup: shell lines to run after `self.setup`."""
        # Since Slurm 22.05 srun does not inherit the cores from sbatch. A failed rank must end the others, which wait for it.
        srun = [f"--cpus-per-task={self.cpus_per_task}", "--kill-on-bad-exit=1"]
        if self.container and not self.container.endswith(".sif"):
            here = Path.cwd()
            srun += [f"--container-image={self.container}", f"--container-mounts={here}:{here}", f"--container-workdir={here}"]
        same = ("nodes", "cpus_per_task", "mem", "partition", "account", "qos", "constraint", "exclude", "array_parallelism")
        # A node failure requeues the job. A job that depends on a failed one is cancelled instead of waiting for ever.
        extra = {"requeue": True, **({"kill-on-invalid-dep": "yes"} if dependency else {})}
        parameters = {
            **{key: getattr(self, key) for key in same},
            "job_name": name,
            "ntasks_per_node": self.ranks_per_node,
            "gpus_per_node": self.gpus_per_node or None,
            "time": self.minutes,
            "signal_delay_s": self.signal_delay,
            "srun_args": srun,
            "setup": [*self.setup, *setup],
            "dependency": dependency,
            "additional_parameters": extra,
        }
        return {key: value for key, value in parameters.items() if value is not None}

    def local(self) -> dict[str, Any]:
        """Return the parameters of submitit's LocalExecutor. Raises ConfigError for several nodes or a container."""
        _require(self.nodes == 1, f"nodes: {self.nodes}, but there is only this machine without Slurm; set it to 1")
        _require(self.container is None, "container: only Slurm starts containers; run this command inside it instead")
        gpus = min(self.gpus_per_node, gpus_here())
        return {
            "tasks_per_node": max(gpus, 1),
            "gpus_per_node": gpus,
            "timeout_min": self.minutes,
            "signal_delay_s": self.signal_delay,
        }


def gpus_here() -> int:
    """Return the number of GPUs of this machine."""
    import torch  # takes seconds, and submitting to Slurm does not need it

    return torch.cuda.device_count()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of `Resources` that the command line may change."""
    for item in fields(Resources):
        if item.name not in ("setup", "stages", "signal_delay"):
            kind = int if isinstance(item.default, int) else str
            parser.add_argument(f"--{item.name.replace('_', '-')}", type=kind, metavar="N" if kind is int else "TEXT")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


class _Loader(yaml.SafeLoader):
    """YAML loader that keeps numbers as text until their type is known: in YAML 1.1, 12:00:00 would be 43200."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(
            f"--defaults or WEAKCLIP_CLUSTER: {file}: no such file; it should hold cluster defaults, see configs/cluster/"
        )
    try:
        found = yaml.load(file.read_text(), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: not a mapping such as nodes: 2; see the examples in configs/cluster/")
    return found


def _merged(base: Resources, changes: Any, source: str) -> Resources:
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(base), changes))  # type: ignore[return-value]
    except ConfigKeyError as error:
        known = ", ".join(asdict(base))
        raise ConfigError(f"{source}: unknown key {error.full_key!r}; the keys are {known}") from error
    except (OmegaConfBaseException, ConfigError) as error:
        raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from error
