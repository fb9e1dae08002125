"""The report on a machine and a recipe."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from weakclip import doctor
from weakclip.config import ConfigError
from weakclip.runtime import lock


@pytest.fixture
def recipe_checks(tiny_config):
    """A function: overrides -> the checks of the tiny recipe by name."""
    return lambda *overrides: {check.name: check for check in doctor.of_recipe(tiny_config(*overrides))}


@pytest.fixture(autouse=True)
def room(monkeypatch):
    """Disks have room, wherever the tests run."""
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(total=2 * doctor.GIB, free=20 * doctor.GIB))


@pytest.fixture
def shards(tmp_path, make_shards):
    return make_shards(tmp_path / "set", 3)


def test_this_machine_runs_the_tests_so_its_libraries_are_ok():
    checks = {check.name: check for check in doctor.machine()}
    assert {checks[name].state for name in ("python", *doctor.LIBRARIES)} == {"ok"}
    assert {"GPUs", "Slurm", "shared memory"} <= checks.keys()


def test_a_library_that_cannot_be_imported_is_wrong_and_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    check = next(check for check in doctor.machine() if check.name == "pydensecrf2")
    assert check.state == "wrong" and check.text.endswith("install it again: pip install --force-reinstall pydensecrf2")


def test_a_recipe_in_order(recipe_checks, shards):
    checks = recipe_checks(f"data.train={shards.root}")
    assert {check.state for check in checks.values()} == {"ok"}
    assert checks["data.train"].text == f"{shards.root}: 3 images" and checks["classes"].text == "3 and background"


def test_what_is_missing_or_damaged_is_named(recipe_checks, shards, tmp_path):
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    checks = recipe_checks(
        f"data.train={tmp_path / 'nowhere'}", f"clip.pretrained={tmp_path / 'broken.pt'}", "clip.model=ViT-B-16"
    )
    assert checks["data.train"].state == "wrong" and "nowhere/index.json: no such file" in checks["data.train"].text
    assert checks["clip.pretrained"].state == "wrong" and "broken.pt" in checks["clip.pretrained"].text
    (shards.root / "shard-00000.tar").unlink()
    checks = recipe_checks(f"data.train={shards.root}", f"data.val={shards.root}")
    assert "shard-00000.tar: shard is missing" in checks["data.train"].text and checks["data.val"].state == "wrong"


def test_a_set_that_a_stage_makes_may_be_missing(recipe_checks, shards, tmp_path):
    checks = recipe_checks(f"data.train={tmp_path / 'cams'}", f"data.labelled={shards.root}")
    assert checks["data.train"].state == "note" and checks["data.train"].text.endswith(
        "does not exist yet: the stage cam makes it"
    )


def test_a_run_in_use_is_named(recipe_checks, shards, tiny_config):
    run = tiny_config().run_dir
    run.root.mkdir()
    lock.take(run)
    check = recipe_checks(f"data.train={shards.root}")["run"]
    assert check.state == "wrong" and "is in use by process" in check.text


def test_json_and_the_exit_code(tiny_recipe, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"2 of \d+ checks are wrong"):
        doctor.main(["--config", str(tiny_recipe), "--json", f"data.train={tmp_path}/a", f"data.val={tmp_path}/b"])
    found = json.loads(capsys.readouterr().out)
    assert {check["name"] for check in found if check["state"] == "wrong"} == {"data.train", "data.val"}
    with pytest.raises(ConfigError, match="no such config file"):
        doctor.main(["--config", "nowhere.yaml"])
