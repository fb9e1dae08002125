"""Modules run as `python -m` runs them, in processes that are forked where the imports are done already.

`import weakclip.train` takes seconds, and a training on two ranks does it twice. multiprocessing starts one server per pytest
process, which does it once. What depends on torchrun, on Slurm or on a fresh interpreter starts a command line instead.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from subprocess import CompletedProcess

import psutil

from tests.conftest import REPO

FORKS = multiprocessing.get_context("forkserver")
# Not the modules that are run themselves: as __main__ they are imported anew.
PRELOADED = ("weakclip.training.loop", "weakclip.models.weakclip", "weakclip.masks.writing", "weakclip.cams.gradcam")
FORKS.set_forkserver_preload([*PRELOADED, "transformers", "pytest"])


class Job:
    """A module running on ranks, with the environment variables that torchrun gives them; 0 ranks: without these."""

    def __init__(self, ranks: int, module: str, *arguments: object) -> None:
        self.line = [module, *map(str, arguments)]
        self._folder = tempfile.TemporaryDirectory()
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
        worlds = [address | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        self.processes = [FORKS.Process(target=_run, args=(self.line, world, self._folder.name)) for world in worlds or [{}]]
        for process in self.processes:
            process.start()

    def kill(self) -> None:
        """SIGKILL for all ranks and what they started."""
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):  # of a rank that has ended: the others have not
                for member in [*psutil.Process(process.pid).children(recursive=True), process]:
                    member.kill()

    def running(self) -> bool:
        return all(process.exitcode is None for process in self.processes)

    def wait(self, seconds: float = 600) -> CompletedProcess[str]:
        """The exit code and what the ranks printed. As under torchrun the first that fails ends the others."""
        end = time.monotonic() + seconds
        while (alive := [p for p in self.processes if p.exitcode is None]) and not any(p.exitcode for p in self.processes):
            assert wait([p.sentinel for p in alive], end - time.monotonic()), f"{self.line}: not within {seconds} s"
        self.kill()
        for process in self.processes:
            process.join()
        failed = [code for code in (process.exitcode for process in self.processes) if code]
        said = [Path(self._folder.name, name).read_text() for name in ("stdout", "stderr")]
        return CompletedProcess(self.line, failed[0] if failed else 0, *said)


def _run(line: list[str], variables: Mapping[str, str], folder: str) -> None:
    """In the new process."""
    multiprocessing.set_start_method(None, force=True)  # multiprocessing makes a server's processes start theirs by a server, too
    os.environ.update(variables)
    os.chdir(REPO)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv[1:] = line[1:]
    runpy.run_module(line[0], run_name="__main__", alter_sys=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
