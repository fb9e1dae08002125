"""Work in background processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from tests.integration.work import die, process_and_signals, process_and_square, square
from weakclip.masks.crf import BOUNDARY, boundary_crfs, dense_crf
from weakclip.runtime.workers import WorkerPool, map_in_threads


@pytest.mark.parametrize("processes", [0, 2])
def test_results_come_in_order_and_errors_as_they_are(processes):
    with WorkerPool(processes) as behind:
        assert [*behind.map(square, range(9))] == [n * n for n in range(9)]
        with pytest.raises(OSError, match="No space left on device: '-1.png'"):
            [*behind.map(square, [1, -1, 2])]


@pytest.mark.parametrize("processes", [0, 2])
def test_each_of_several_threads_can_leave_its_work_to_a_process(processes):
    with WorkerPool(processes) as behind:
        found = [*map_in_threads(lambda n: behind.run(process_and_square, n), 3, range(9))]
        assert [square for _, square in found] == [n * n for n in range(9)]
        assert (os.getpid() in {process for process, _ in found}) == (not processes)
        with pytest.raises(OSError, match="No space left on device: '-1.png'"):
            behind.run(square, -1)
    assert "GLIBC_TUNABLES" not in os.environ


def test_arguments_are_made_as_they_are_needed():
    made = []
    with WorkerPool(1) as behind:
        assert next(behind.map(square, (made.append(n) or n for n in range(100)))) == 0 and len(made) <= 4


def test_a_process_that_dies_is_an_error():
    with pytest.raises(ValueError, match=r"a worker process was killed, .* \(.*pseudo.processes.*\)"), WorkerPool(1) as behind:
        [*behind.map(die, range(3))]
    with pytest.raises(ValueError, match=r"a worker process was killed, .* \(.*pseudo.processes.*\)"), WorkerPool(1) as behind:
        behind.run(die, 0)


def test_the_processes_leave_a_jobs_signals_to_the_one_that_began_them():
    with WorkerPool(1) as behind:
        ((pid, blocked),) = behind.map(process_and_signals, range(1))
    assert pid != os.getpid()
    assert {signal.SIGTERM, signal.SIGUSR2, signal.SIGINT} <= blocked
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_the_boundary_losss_crf_is_the_same_in_processes():
    generator = np.random.default_rng(0)
    probs_BKHW = generator.dirichlet(np.ones(4), (3, 12, 10)).astype(np.float32).transpose(0, 3, 1, 2)
    pairs = list(zip(probs_BKHW, generator.integers(0, 256, (3, 12, 10, 3), np.uint8), strict=True))
    np.testing.assert_array_equal(boundary_crfs(pairs, 2), [dense_crf(*pair, BOUNDARY) for pair in pairs])


WORKING = """
from weakclip.runtime.workers import WorkerPool
print("this is", __name__)
if __name__ == "__main__":
    with WorkerPool(1) as behind:
        print([*behind.map(abs, [-1, -2])])
"""


def test_the_processes_do_not_import_the_command_again(tmp_path, repo):
    (tmp_path / "working.py").write_text(WORKING)
    environment = os.environ | {"PYTHONPATH": str(repo)}
    done = subprocess.run([sys.executable, tmp_path / "working.py"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "this is __main__\n[1, 2]\n"


SIGNALLED = """
import signal, time
import psutil
from weakclip.runtime.workers import WorkerPool
if __name__ == "__main__":
    behind = WorkerPool(1)
    print([*behind.map(abs, [-1])])
    for child in psutil.Process().children(recursive=True):  # as Slurm does before a preemption
        child.send_signal(signal.SIGUSR2)
    time.sleep(0.2)
    print([*behind.map(abs, [-2])])
"""


def test_a_pool_outlives_a_jobs_signals_and_ends_without_a_word(tmp_path, repo):
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    environment = os.environ | {"PYTHONPATH": str(repo)}
    done = subprocess.run([sys.executable, tmp_path / "signalled.py"], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[1]\n[2]\n", "")


ENDLESS = """
import itertools, time
from weakclip.runtime.workers import WorkerPool
if __name__ == "__main__":
    with WorkerPool(2) as behind:
        for _ in behind.map(time.sleep, itertools.repeat(0.05)):
            print("running", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_processes_end_with_the_one_that_began_them(tmp_path, repo, number):
    (tmp_path / "endless.py").write_text(ENDLESS)
    environment = os.environ | {"PYTHONPATH": str(repo)}
    process = subprocess.Popen([sys.executable, tmp_path / "endless.py"], env=environment, stdout=subprocess.PIPE)
    process.stdout.readline()
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    process.send_signal(number)
    assert process.wait(20) == -number
    deadline = time.monotonic() + 20
    while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in family):
        assert time.monotonic() < deadline
        time.sleep(0.05)
