"""Work in threads and in background processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

from weakclip.runtime.workers import WorkerPool, map_in_threads


def square(number: int) -> int:
    if number < 0:
        raise OSError(28, "No space left on device", f"{number}.png")
    return number * number


def process_and_square(number: int) -> tuple[int, int]:
    return os.getpid(), square(number)


def die(_number: int) -> None:
    os._exit(3)


def process_and_signals(number: int) -> tuple[int, set]:
    return os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, [])


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


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_give_results_in_order_and_errors_as_they_are(threads):
    assert [*map_in_threads(square, threads, range(9))] == [n * n for n in range(9)]
    done = []
    with pytest.raises(OSError, match="No space left on device: '-1.png'"):
        for result in map_in_threads(square, threads, [1, -1, 2]):
            done.append(result)
    assert done == [1]


def test_what_threads_do_is_done_side_by_side_and_not_far_ahead():
    both, made = threading.Barrier(2, timeout=20), []
    results = map_in_threads(lambda n: both.wait() if n < 2 else n, 2, (made.append(n) or n for n in range(100)))
    assert next(results) in (0, 1) and len(made) <= 5
    results.close()


def test_each_of_several_threads_has_one_core_for_torch():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert [*map_in_threads(lambda _: torch.get_num_threads(), 2, range(4))] == [1] * 4
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_process_that_dies_is_an_error():
    with pytest.raises(ValueError, match=r"a worker process was killed, .* \(.*pseudo.processes\)"), WorkerPool(1) as behind:
        [*behind.map(die, range(3))]
    with pytest.raises(ValueError, match=r"a worker process was killed, .* \(.*pseudo.processes\)"), WorkerPool(1) as behind:
        behind.run(die, 0)


def test_the_processes_leave_a_jobs_signals_to_the_one_that_began_them():
    with WorkerPool(1) as behind:
        ((pid, blocked),) = behind.map(process_and_signals, range(1))
    assert pid != os.getpid()
    assert {signal.SIGTERM, signal.SIGUSR2, signal.SIGINT} <= blocked
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


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
