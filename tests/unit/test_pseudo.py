"""Pseudo masks: which weights, whose masks, which files, what is in them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from weakclip import labels, pseudo
from weakclip.checkpoints import weights as stored
from weakclip.checkpoints.weight_files import ArchiveError
from weakclip.config import ConfigError, save
from weakclip.data.index import ShardError
from weakclip.data.stream import StoredSamples
from weakclip.masks import mask_folder, sliding_window
from weakclip.masks.statistics import Curves
from weakclip.runtime.workers import WorkerPool

NO_CRF = "pseudo.crf=null"


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_shards):
    return make_shards(tmp_path_factory.mktemp("pseudo") / "set", 3, 2)


def written(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


# ------------------------------------------------------------------------------------------------------------- weights


def test_best_falls_back_to_last_and_a_path_is_itself(tiny_config, weights):
    config, best = tiny_config(), weights.with_name("best.safetensors")
    assert stored.find(config, "best") == stored.find(config, "last") == weights
    best.touch()
    assert stored.find(config, "best") == best and stored.find(config, "last") == weights
    assert stored.find(config, str(best)) == best


@pytest.mark.parametrize(
    "choice, named", [("best", "last.safetensors"), ("last", "last.safetensors"), ("there/w.st", "there/w.st")]
)
def test_missing_weights_name_the_file(tiny_config, choice, named):
    with pytest.raises(ConfigError, match=f"--weights {choice}: .*{named} does not exist; train first, or set run"):
        stored.find(tiny_config(), choice)


def test_saved_weights_load_into_the_same_model(tiny_config, tiny_model, weights):
    model, x_B3HW = stored.load_model(tiny_config(), weights), torch.randn(1, 3, 64, 64)
    assert not model.training and not weights.with_name("last.safetensors.partial").exists()
    assert model.cpu()(x_B3HW).logits_BKhw.equal(tiny_model()(x_B3HW).logits_BKhw)


def test_saved_weights_hold_the_trainable_part_alone(tiny_model, weights):
    state = tiny_model().state_dict()
    assert load_file(weights).keys() == state.keys()
    assert weights.stat().st_size < 1.2 * sum(t.numel() * t.element_size() for t in state.values()) + 20_000


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "decoder.head_channels=8",
            r"does not fit; 36 of another shape: .* is \[24, 24, 3, 3\], not \[8, 24, 3, 3\], .* and 26 more; take",
        ),
        ("classes=voc", r"made for 4 classes \(K\), but the config has 21; set classes as in its run"),
        ("prompts.length=4", r"does not fit; 1 of another shape: prompts_ND is \[8, 32\], not \[4, 32\]; take the config"),
        ("matching.layers=2", r"does not fit; 40 unknown: matching.text_branch.layers.2.* and 30 more; take"),
        ("matching.layers=4", r"does not fit; 40 missing: matching.text_branch.layers.3.* and 30 more; take"),
        (
            "clip={model: ViT-B-16-quickgelu, pretrained: none}",
            r"made for 64 channels of the vision tower, but the config has 768",
        ),
    ],
)
def test_weights_of_another_model_are_refused(tiny_config, weights, override, message):
    with pytest.raises(ConfigError, match=f"last.safetensors: {message}") as caught:
        stored.load_model(tiny_config(override), weights)
    assert "\n" not in str(caught.value)


def test_damaged_and_foreign_weights_are_refused(tiny_config, weights):
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ArchiveError, match="last.safetensors: cannot be read as weights .*; was it fetched whole?"):
        stored.load_model(tiny_config(), weights)
    save_file({"something": torch.zeros(1)}, weights)
    with pytest.raises(
        ConfigError, match="last.safetensors: does not fit; .* missing: prompts_ND, .*; 1 unknown: something; take the config"
    ):
        stored.load_model(tiny_config(), weights)


# -------------------------------------------------------------------------------------------------------- masks' folder


def test_the_folder_notes_whose_masks_it_holds(tiny_config, weights, tmp_path):
    config = tiny_config()
    mask_folder.claim(tmp_path / "out", config, weights)
    about = json.loads((tmp_path / "out/about.json").read_text())
    assert about["scales"] == [1.0] and about["scale"] == [128, 64] and about["crf"]["bilateral_sxy"] == 83
    mask_folder.claim(tmp_path / "out", config, weights)  # the same again


@pytest.mark.parametrize(
    "override", ["pseudo.scales=[0.5]", NO_CRF, "pseudo.crf.iterations=3", "data.scale=[64,64]", "pseudo.flip=false"]
)
def test_masks_of_other_options_are_refused(tiny_config, weights, tmp_path, override):
    mask_folder.claim(tmp_path / "out", tiny_config(), weights)
    with pytest.raises(ConfigError, match="out holds masks of other weights or options .*about.json.*; give another --out"):
        mask_folder.claim(tmp_path / "out", tiny_config(override), weights)


def test_masks_of_other_weights_are_refused(tiny_config, tiny_model, weights, tmp_path):
    mask_folder.claim(tmp_path / "out", tiny_config(), weights)
    stored.save(tiny_model(), weights, step=4)
    with pytest.raises(ConfigError, match="other weights or options"):
        mask_folder.claim(tmp_path / "out", tiny_config(), weights)


def test_a_folder_that_another_task_is_just_claiming_is_no_strangers(tiny_config, weights, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/about.json.deadbeef.partial").touch()
    mask_folder.claim(tmp_path / "out", tiny_config(), weights)
    assert mask_folder.read_about(tmp_path / "out") == mask_folder.about(tiny_config(), weights)


def test_a_folder_of_other_files_is_refused(tiny_config, weights, tmp_path):
    (tmp_path / "out").mkdir()
    mask_folder.claim(tmp_path / "out", tiny_config(), weights)  # empty: taken
    (tmp_path / "out/about.json").rename(tmp_path / "out/photo.png")
    with pytest.raises(ConfigError, match="out holds files that are no pseudo masks; give another --out"):
        mask_folder.claim(tmp_path / "out", tiny_config(), weights)


# ---------------------------------------------------------------------------------------------------------------- masks


def mask_of(probs_KHW, monkeypatch, config, classes=(1,)) -> np.ndarray:
    H, W = probs_KHW.shape[1:]
    sample = SimpleNamespace(key="made up", image=np.full((H, W, 3), 128, np.uint8), classes=classes)
    monkeypatch.setattr(sliding_window, "predict_tiles", lambda *_: [[torch.tensor(probs_KHW)]])
    return pseudo.pseudo_mask(None, sample, config)


def columns(*probs: list[float]) -> np.ndarray:
    """Each argument is the probabilities of a column of pixels: K x 8 x columns."""
    return np.repeat(np.array(probs, np.float32).T[:, None], 8, axis=1)


def test_without_crf_the_mask_is_the_likeliest_class(tiny_config, monkeypatch):
    mask_HW = mask_of(columns([0.6, 0.3, 0.1], [0.1, 0.3, 0.6], [0.2, 0.5, 0.3]), monkeypatch, tiny_config(NO_CRF))
    assert mask_HW.dtype == np.uint8 and mask_HW[0].tolist() == [0, 2, 1]


def test_restricting_to_labels_leaves_background_and_present_classes(tiny_config, monkeypatch):
    probs_KHW = columns([0.4, 0.0, 0.6], [0.1, 0.3, 0.6], [0.2, 0.5, 0.3])
    config = tiny_config(NO_CRF, "pseudo.restrict_to_labels=true")
    assert mask_of(probs_KHW, monkeypatch, config, classes=(1,))[0].tolist() == [0, 1, 1]
    assert not mask_of(probs_KHW, monkeypatch, config, classes=()).any()
    crf = tiny_config("pseudo.restrict_to_labels=true")
    assert 2 not in mask_of(probs_KHW.repeat(8, axis=2), monkeypatch, crf, classes=(1,))


def test_the_crf_smooths_unless_it_is_null(tiny_config, monkeypatch):
    probs_KHW = np.repeat(columns([0.9, 0.1]), 9, axis=2)
    probs_KHW[:, 4, 4] = 0.4, 0.6
    assert mask_of(probs_KHW, monkeypatch, tiny_config(NO_CRF)).sum() == 1
    assert not mask_of(probs_KHW, monkeypatch, tiny_config()).any()


def test_masks_of_a_set_are_palette_pictures_of_the_images_sizes(tiny_config, tiny_model, weights, shards, tmp_path):
    config = tiny_config(NO_CRF)
    out = pseudo.run(config, str(shards.root), weights, tmp_path / "out")
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


def test_a_mask_that_another_job_wrote_meanwhile_is_kept(tiny_config, tiny_model, shards, tmp_path):
    samples = [*StoredSamples(shards, shards.entries, 0)]
    (tmp_path / "image_1.png").write_bytes(b"kept")
    curves = Curves(tmp_path / "board", 0)
    pseudo.write_masks(tiny_model().predictor(), tiny_config(NO_CRF), samples, tmp_path, curves, WorkerPool(0))
    assert len(written(tmp_path)) == 3 and written(tmp_path)["image_1.png"] == b"kept"


def test_a_wrong_set_or_selection_makes_no_folder(tiny_config, weights, shards, tmp_path):
    for data, chosen in [("nowhere", None), (str(shards.root), "9")]:
        with pytest.raises((ShardError, ValueError)):
            pseudo.run(tiny_config(NO_CRF), data, weights, tmp_path / "out", chosen)
    assert not (tmp_path / "out").exists()


def test_the_command_writes_into_the_run(tiny_config, weights, shards, tmp_path, capsys):
    save(tiny_config(NO_CRF, f"data.train={shards.root}"), tmp_path / "recipe.yaml")
    pseudo.main(["--config", str(tmp_path / "recipe.yaml"), "--shards", "1:"])
    assert capsys.readouterr().out.strip() == f"masks: {tmp_path / 'run/pseudo'}"
    assert list(written(tmp_path / "run/pseudo")) == ["image_2.png"]
