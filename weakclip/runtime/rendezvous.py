"""The rank of a process in its job, as the environment variables that torch.distributed and DeepSpeed read."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from typing import NamedTuple


class _Launcher(NamedTuple):
    """Environment variables in which a launcher gives a process its rank, the number of ranks, the job's id and its nodes."""

    rank: str
    local_rank: str
    ranks: str
    job: str
    nodes: str


_LAUNCHERS = (
    # The variables of the job step, which `srun` starts: the batch script itself is one process, whatever was requested.
    _Launcher("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "SLURM_STEP_NODELIST"),
    _Launcher("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_LOCALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_JOB_ID", ""),
)


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for a process with this environment.

    Where torchrun has set them, the result is empty. Otherwise they are derived from the variables of Slurm (`srun`) or of
    submitit's local launcher. Without these the process is the only rank.
    """
    if "RANK" in environment:
        return {}
    for launcher in _LAUNCHERS:
        if int(environment.get(launcher.ranks, 1)) > 1:
            return {
                "RANK": environment[launcher.rank],
                "LOCAL_RANK": environment[launcher.local_rank],
                "WORLD_SIZE": environment[launcher.ranks],
                "MASTER_ADDR": first_host(environment.get(launcher.nodes, "127.0.0.1")),
                "MASTER_PORT": str(_port_of(int(environment[launcher.job]))),
            }
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}


def first_host(nodes: str) -> str:
    """Return the first host of a node list as Slurm writes it: "gpu[003-005,9],login" -> "gpu003"."""
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", nodes).split(",")[0]


def _port_of(job: int) -> int:
    """Return a port that depends on the job, below those that the system gives to outgoing connections."""
    return 10_000 + job % 20_000


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
