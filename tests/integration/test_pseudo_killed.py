"""Pseudo masks by a command that is killed and restarted until it is done."""

from __future__ import annotations

import signal
import time

import pytest

from tests.integration.preloaded import Job
from weakclip.checkpoints import weights as stored

IMAGES = 10
OPTIONS = ("pseudo.scales=[0.5,1.0]", "pseudo.soft=true", "pseudo.crf.iterations=2", "data.scale=[256,128]")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_shards):
    return make_shards(tmp_path_factory.mktemp("pseudo") / "set", IMAGES, 3, H=150, W=200)


def test_killed_at_any_time_it_writes_the_same_files_and_none_twice(launch, tiny_recipe, tiny_model, shards, tmp_path):
    stored.save(tiny_model(), tmp_path / "run/weights/last.safetensors", step=3)

    def arguments(out):
        return "--config", tiny_recipe, "--out", tmp_path / out, f"run={tmp_path}/run", f"data.train={shards.root}", *OPTIONS

    launch(0, "weakclip.pseudo", *arguments("whole"))
    folder, made = tmp_path / "killed", {}
    for enough, processes in ((1, 1), (6, 0)):
        job = Job(0, "weakclip.pseudo", *arguments("killed"), f"pseudo.processes={processes}")
        while job.running() and len([*folder.glob("*.png")]) < enough:
            time.sleep(0.002)
        job.processes[0].kill()  # and not its worker process, which must end by itself
        assert job.wait().returncode == -signal.SIGKILL, "it ended before it could be killed"
        made |= {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    (folder / f"image_{IMAGES - 1}.png.01234567.partial").write_bytes(b"as if it had been killed as it wrote")
    launch(0, "weakclip.pseudo", *arguments("killed"))
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("killed", "whole")]
    assert contents[0] == contents[1] and len(contents[0]) == 2 * IMAGES + 1
    assert {path: path.stat().st_mtime_ns for path in made} == made
