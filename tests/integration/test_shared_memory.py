"""A container's small /dev/shm, as a tmpfs in a mount namespace of its own."""

from __future__ import annotations

import subprocess

import pytest

from tests.integration.conftest import ENVIRONMENT, REPO, command

CURES = "start the container with --shm-size=1g or --ipc=host, or set data.workers=0"


@pytest.fixture
def run_in(tiny_recipe, make_shards, tmp_path):
    """Returns a function that runs a command on the tiny recipe where /dev/shm has `size` bytes, of which `used` are taken."""
    shards = make_shards(tmp_path / "shards", count=11, per_shard=4)

    def mounted(size: str, used: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        setup = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && head -c {used} /dev/zero > /dev/shm/others"
        shell = ["unshare", "-m", "bash", "-c", f'{setup} && exec "$@"', "bash"]
        return subprocess.run([*shell, *arguments], capture_output=True, text=True, env=ENVIRONMENT, cwd=REPO)

    if mounted("64k", "0", "true").returncode:
        pytest.skip("a tmpfs cannot be mounted in a namespace here")

    def run(size: str, used: str, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        fixed = ("--config", str(tiny_recipe), f"run={tmp_path / 'run'}", f"data.train={shards.root}")
        return mounted(size, used, *command(0, module, *fixed, *arguments))

    return run


SETTINGS = ("train.steps=3", "train.batch=8", "data.workers=2")


def test_too_little_for_the_batches_is_one_line_before_the_run_is_made(run_in, tmp_path):
    done = run_in("256k", "0", "weakclip.train", *SETTINGS)
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert done.stderr.strip() == (
        "error: /dev/shm: shared memory is 0.25 MiB, and the batches of the loader processes need 0.5 MiB of it; " + CURES
    )
    assert run_in("256k", "0", "weakclip.train", *SETTINGS, "data.workers=0").returncode == 0


def test_what_others_have_left_too_little_of_is_one_line(run_in):
    done = run_in("768k", "600k", "weakclip.train", *SETTINGS)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert last == f"error: /dev/shm: a loader process found no room for a batch in shared memory; {CURES}"


def test_reading_stored_samples_needs_next_to_no_shared_memory(run_in):
    done = run_in("256k", "0", "weakclip.evaluate", "--what", "seeds", "data.workers=2")
    assert done.returncode == 0, done.stderr
