"""Paths on command lines: missing folders above an output are made, and a wrong path is one line that names its option."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest

from weakclip import cli
from weakclip.data.index import Index
from weakclip.masks import mask_folder
from weakclip.masks.mask_folder import MaskSettings
from weakclip.recipe import save
from weakclip.test import write_archive


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory) -> str:
    return str(make_shards(tmp_path_factory.mktemp("paths") / "set", count=2, per_shard=2).root)


@pytest.fixture
def place(tiny_config, shards, weights, tmp_path, monkeypatch):
    """The working directory: recipe.yaml, sweep.yaml, "a file", and a run with weights and masks of the set `shards`."""
    config = tiny_config(f"data.train={shards}", f"data.val={shards}", "pseudo.crf=null")
    for path in ("recipe.yaml", "run/config.yaml"):
        save(config, tmp_path / path)
    sweep = {"recipe": str(tmp_path / "recipe.yaml"), "run": "sweeps", "tasks": {"one": ["seed=1"]}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    (tmp_path / "a file").touch()
    mask_folder.open_for_writing(tmp_path / "run/pseudo", MaskSettings.of(config), weights)
    for key in ("image_0", "image_1"):
        mask_folder.save(np.zeros((48, 64), np.uint8), tmp_path / f"run/pseudo/{key}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(line: str, shards: str) -> list[str]:
    return [{"SET": shards}.get(word, word.replace("a_file", "a file")) for word in line.split()]


@pytest.mark.parametrize(
    "line, written",
    [
        ("show SET --out new/sheets/a.png", "new/sheets/a.png"),
        ("stats SET --json new/figures/a.json --processes 1", "new/figures/a.json"),
        ("evaluate --config recipe.yaml --out new/scores/a.json", "new/scores/a.json"),
        ("pseudo --config recipe.yaml --out new/masks", "new/masks/image_0.png"),
        ("reshard SET --out new/sets/a --processes 1", "new/sets/a/index.json"),
        ("sweep sweep.yaml --json new/sweeps/a.json", "new/sweeps/a.json"),
        ("convert run new/converted/a.safetensors", "new/converted/a.safetensors"),
    ],
)
def test_folders_above_an_output_are_made(place, shards, capsys, line, written):
    cli.main(arguments(line, shards))
    assert (place / written).is_file()


@pytest.mark.parametrize(
    "line, message",
    [
        ("show SET --out .", "argument --out: .: is a folder; name a file"),
        ("show SET --out a_file/a.png", "argument --out: a file/a.png: lies in a file, not in a folder"),
        ("stats SET --json .", "argument --json: .: is a folder; name a file"),
        ("reshard SET --seeds nowhere --out x", "argument --seeds: nowhere: no such folder"),
        ("reshard SET --out a_file", "argument --out: a file: is or lies in a file; name a folder"),
        ("evaluate --config recipe.yaml --masks nowhere", "argument --masks: nowhere: no such folder"),
        ("evaluate --config recipe.yaml --data nowhere", "argument --data: nowhere: no such shard set"),
        ("evaluate --config recipe.yaml --out .", "argument --out: .: is a folder; name a file"),
        ("pseudo --config recipe.yaml --data nowhere", "argument --data: nowhere: no such shard set"),
        ("pseudo --config recipe.yaml --out a_file/x", "argument --out: a file/x: is or lies in a file; name a folder"),
        ("test --config recipe.yaml --data nowhere", "argument --data: nowhere: no such shard set"),
        ("test --config recipe.yaml --archive .", "argument --archive: .: is a folder; name a file"),
        ("sweep sweep.yaml --json .", "argument --json: .: is a folder; name a file"),
        ("convert run a_file/out.pth", "argument OUT: a file/out.pth: lies in a file, not in a folder"),
        ("fidelity nowhere", "argument DIR: nowhere: no such folder"),
        (
            "submit --stage train --config recipe.yaml --defaults nowhere.yaml",
            "--defaults or WEAKCLIP_CLUSTER: nowhere.yaml",
        ),
        ("show SET --config nowhere.yaml --out x.png", "nowhere.yaml: no such config file"),
        ("show nowhere --out x.png", "nowhere/index.json: no such file; `python shards/build.py` makes a shard set"),
    ],
)
def test_a_wrong_path_is_one_line_that_names_its_option(place, shards, capsys, line, message):
    before = sorted(place.rglob("*"))
    assert message in one_line(arguments(line, shards), capsys)
    assert sorted(place.rglob("*")) == before


def one_line(words: Sequence[str], capsys) -> str:
    with pytest.raises(SystemExit):
        cli.run(cli.main, words)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_the_folder_above_an_archive_is_made(place, shards):
    write_archive(place / "run/pseudo", Index.load(shards).entries, place / "new/archives/a.tar")
    assert (place / "new/archives/a.tar").is_file()
