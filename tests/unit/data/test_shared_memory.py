"""Shared memory that is too small for the batches of loader processes: one line with the cures."""

from __future__ import annotations

import pytest

from weakclip.data import shared_memory
from weakclip.data.stream import StreamSettings
from weakclip.runtime.errors import UserError

CURES = r"start the container with --shm-size=\d+g or --ipc=host, or set data.workers=0"


def test_less_than_the_loaders_need_is_refused_with_the_cures(tmp_path):
    shared_memory.require(0, tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path}: shared memory is .* MiB, and .* need 1.1e\+12 MiB of it; {CURES}"):
        shared_memory.require(2**60, tmp_path)


def test_a_system_without_such_a_folder_is_not_refused(tmp_path):
    shared_memory.require(2**60, tmp_path / "none")


def test_the_need_counts_the_ranks_of_a_node_and_their_workers(tiny_config, monkeypatch):
    needed = []
    monkeypatch.setattr(shared_memory, "require", needed.append)
    settings = StreamSettings.of(tiny_config("data.workers=3", "train.batch=5"))
    settings.require_shared_memory()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # as torchrun sets it
    settings.require_shared_memory()
    StreamSettings.of(tiny_config("data.workers=0")).require_shared_memory()
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x2)")
    settings.require_shared_memory()
    one = 3 * 2 * 5 * 64 * 64 * 4
    assert needed == [one, 8 * one, 0, 4 * one]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory(shm) for file"),
        RuntimeError("unable to write to file </torch_11957_3183851529_0>: No space left on device (28)"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"),
        OSError(28, "No space left on device"),  # of a semaphore
    ],
)
def test_every_error_of_full_shared_memory_names_the_cures(error):
    with pytest.raises(UserError, match=f"/dev/shm: .* no room for a batch in shared memory; {CURES}"):
        raise shared_memory.exhausted(error) or error


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), OSError(28, "No space left on device", "mask.png")])
def test_other_errors_are_not_taken_for_it(error):
    assert shared_memory.exhausted(error) is None
