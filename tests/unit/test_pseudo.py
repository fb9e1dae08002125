"""Pseudo masks: the choice of weights, shard set and output."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from weakclip import labels, pseudo
from weakclip.data.index import ShardError
from weakclip.masks import sliding_window, writing
from weakclip.models.weakclip import WeakCLIP
from weakclip.recipe import save
from weakclip.runtime.errors import UserError
from weakclip.stages import STAGES

NO_CRF = "pseudo.crf=null"


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_shards):
    return make_shards(tmp_path_factory.mktemp("pseudo") / "set", 3, 2)


def written(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def test_best_falls_back_to_last_and_a_path_is_itself(tiny_config, weights):
    run, best = tiny_config().run_dir, weights.with_name("best.safetensors")
    assert run.find_weights("best") == run.find_weights("last") == weights
    best.touch()
    assert run.find_weights("best") == best and run.find_weights("last") == weights
    assert run.find_weights(str(best)) == best


@pytest.mark.parametrize(
    "choice, named", [("best", "last.safetensors"), ("last", "last.safetensors"), ("there/w.st", "there/w.st")]
)
def test_missing_weights_name_the_file(tiny_config, choice, named):
    with pytest.raises(UserError, match=f"--weights {choice}: .*{named} does not exist; train first, or set run"):
        tiny_config().run_dir.find_weights(choice)


def test_masks_of_a_set_are_palette_pictures_of_the_images_sizes(tiny_config, tiny_model, weights, shards, tmp_path):
    config = tiny_config(NO_CRF)
    out = tmp_path / "out"
    pseudo.run(config, str(shards.root), weights, out)
    assert sorted(written(out)) == [f"image_{n}.png" for n in range(3)]
    assert sorted(path.name for path in out.iterdir()) == ["about.json", *written(out)]
    rng = np.random.default_rng(0)
    image_HW3 = rng.integers(0, 256, (48, 64, 3), np.uint8)  # image_0
    image_HW3[0, 0] = 0
    want_HW = sliding_window.predict(tiny_model().predictor(), image_HW3, config.pseudo, config.data.scale).argmax(0).numpy()
    with Image.open(out / "image_0.png") as picture:
        assert picture.mode == "P" and picture.getpalette()[:768] == labels.palette()
        np.testing.assert_array_equal(np.asarray(picture), want_HW)


def test_masks_that_are_there_are_kept_and_only_missing_ones_are_written(tiny_config, weights, shards, tmp_path):
    config, out = tiny_config(NO_CRF), tmp_path / "out"
    pseudo.run(config, str(shards.root), weights, out, "0")
    assert sorted(written(out)) == ["image_0.png", "image_1.png"]
    (out / "image_0.png").write_bytes(b"kept")
    pseudo.run(config, str(shards.root), weights, out)
    again = written(out)
    assert len(again) == 3 and again["image_0.png"] == b"kept"


def test_a_wrong_set_or_selection_makes_no_folder(tiny_config, weights, shards, tmp_path):
    for data, chosen in [("nowhere", None), (str(shards.root), "9")]:
        with pytest.raises((ShardError, ValueError)):
            pseudo.run(tiny_config(NO_CRF), data, weights, tmp_path / "out", chosen)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "device", "images", "compiled"),
    [
        ("auto", "cuda", 1000, True),
        ("auto", "cuda", 999, False),
        ("on", "cuda", 1, True),
        ("off", "cuda", 10_000, False),
        ("on", "cpu", 10_000, False),
    ],
)
def test_many_masks_on_a_gpu_are_made_by_a_compiled_network(
    tiny_config, tiny_model, weights, shards, tmp_path, monkeypatch, setting, device, images, compiled
):
    used = []
    predictor = tiny_model().predictor()._replace(device=torch.device(device))
    monkeypatch.setattr(WeakCLIP, "predictor", lambda _model: predictor)
    monkeypatch.setattr(writing, "write_part", lambda load_predictor, *_: used.append(load_predictor(images)))
    pseudo.run(tiny_config(f"train.compile={setting}"), str(shards.root), weights, tmp_path / "out")
    assert [predictor.compiled for predictor in used] == [compiled]


def test_the_stage_counts_masks_and_does_nothing_twice(tiny_config, weights, shards, tmp_path, capsys, caplog):
    config = tiny_config(NO_CRF, f"data.train={shards.root}")
    STAGES["pseudo"].run(config, None)
    assert STAGES["pseudo"].progress(config, shards).complete
    caplog.set_level("INFO")
    caplog.clear()
    capsys.readouterr()
    STAGES["pseudo"].run(config, None)
    assert not capsys.readouterr().err and not [record for record in caplog.records if record.name.startswith("weakclip.")]
    assert "processes" not in json.loads((tmp_path / "run/pseudo/about.json").read_text())


def test_the_command_writes_into_the_run(tiny_config, weights, shards, tmp_path, capsys):
    save(tiny_config(NO_CRF, f"data.train={shards.root}"), tmp_path / "recipe.yaml")
    pseudo.main(["--config", str(tmp_path / "recipe.yaml"), "--shards", "1:"])
    assert capsys.readouterr().out.strip() == f"masks: {tmp_path / 'run/pseudo'}"
    assert list(written(tmp_path / "run/pseudo")) == ["image_2.png"]
