"""Signals to loader processes: they ignore those of Slurm, since their rank saves a checkpoint, and obey those of their rank."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.integration.conftest import ENVIRONMENT
from weakclip import recipe

PROGRAM = """
import subprocess, sys
import psutil
from weakclip import recipe
from functools import partial
from weakclip.data.index import open_index
from weakclip.data.stream import StreamSettings, training_batches
from weakclip.masks.seeds import seed_mask
from weakclip.labels import class_names

config = recipe.load(sys.argv[1])
index = open_index(config.data.train, class_names(config.classes))
batches = training_batches(index, StreamSettings.of(config), partial(seed_mask, config=config.seeds))
next(batches)
workers = [str(child.pid) for child in psutil.Process().children()]
assert len(workers) == 2
for name in sys.argv[2:]:
    subprocess.run(["kill", "-s", name, *workers], check=True)
print([next(batches).keys for _ in range(8)])
"""


SHOOTER = """
import os, psutil, signal
trainer, hit = psutil.Process(os.getppid()), {os.getpid()}
print("ready", flush=True)
while len(hit) < 3:
    for child in {child.pid for child in trainer.children()} - hit:
        os.kill(child, signal.SIGUSR2)
        hit.add(child)
"""

EARLY = """
import signal, subprocess, sys
from weakclip import recipe
from functools import partial
from weakclip.data.index import open_index
from weakclip.data.stream import StreamSettings, training_batches
from weakclip.masks.seeds import seed_mask
from weakclip.labels import class_names

config = recipe.load(sys.argv[1])
index = open_index(config.data.train, class_names(config.classes))
batches = training_batches(index, StreamSettings.of(config), partial(seed_mask, config=config.seeds))
shooter = subprocess.Popen([sys.executable, "-c", sys.argv[2]], stdout=subprocess.PIPE)
shooter.stdout.readline()
print([next(batches).keys for _ in range(9)])
assert shooter.wait() == 0 and signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
"""


def test_loader_processes_survive_signals_that_come_as_they_begin(make_shards, tiny_config, tmp_path):
    recipe.save(tiny_config(f"data.train={make_shards(tmp_path / 'set').root}", "data.workers=2"), tmp_path / "config.yaml")
    line = [sys.executable, "-c", EARLY, str(tmp_path / "config.yaml"), SHOOTER]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.count("[") == 10, done.stderr


@pytest.mark.parametrize("signals", [[], ["TERM", "USR2", "TERM"]], ids=str)
def test_loader_processes_survive_others_signals_and_end_with_their_rank(signals, make_shards, tiny_config, tmp_path):
    """The program never closes its loader, as when an error that nobody catches ends it."""
    config = tiny_config(f"data.train={make_shards(tmp_path / 'set').root}", "data.workers=2")
    recipe.save(config, tmp_path / "config.yaml")
    line = [sys.executable, "-c", PROGRAM, str(tmp_path / "config.yaml"), *signals]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[") == 9


def test_a_signal_that_comes_after_the_work_does_not_make_it_a_failure():
    """Python gives signals their usual effect back as it ends, before the process has ended."""
    script = """
import os, signal
from weakclip.runtime.signals import SIGNALS, nothing_left_to_save
for number in SIGNALS:
    signal.signal(number, lambda *_: None)
nothing_left_to_save()
for number in SIGNALS:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
"""
    assert subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT).returncode == 0
