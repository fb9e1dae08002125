"""Pseudo masks at scale: arrays, restarts, full disks, large images, broken networks, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from weakclip import pseudo
from weakclip.checkpoints import weights as stored
from weakclip.masks import mask_folder, sliding_window
from weakclip.stages import STAGES

NO_CRF = "pseudo.crf=null"


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_shards):
    return make_shards(tmp_path_factory.mktemp("pseudo") / "set", 7, 2, H=70, W=90)


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".png", ".npz")}


# ---------------------------------------------------------------------------------------------------- the same masks


SCALES = ("pseudo.scales=[0.5,1.0,1.5]", "pseudo.flip=true", "pseudo.soft=true", "pseudo.crf.iterations=2")


def test_four_tasks_write_the_bytes_of_one_whatever_is_there_already(tiny_config, weights, shards, tmp_path):
    alone = pseudo.run(tiny_config(*SCALES), str(shards.root), weights, tmp_path / "alone")
    for part in ("0:1", "1:2", "2:3", "3:4"):
        pseudo.run(tiny_config(*SCALES), str(shards.root), weights, tmp_path / "array", part)
    assert written(tmp_path / "array") == written(alone) and len(written(alone)) == 14
    for name in ("image_1.png", "image_2.png", "image_2.npz", "image_6.npz"):
        (tmp_path / "array" / name).unlink()
    pseudo.run(tiny_config(*SCALES, "pseudo.processes=2"), str(shards.root), weights, tmp_path / "array")
    assert written(tmp_path / "array") == written(alone)


def test_a_stop_between_two_masks_is_made_up_for(tiny_config, weights, shards, tmp_path, monkeypatch):
    config = tiny_config(*SCALES)
    alone = pseudo.run(config, str(shards.root), weights, tmp_path / "alone")
    save, saved = mask_folder.save, []

    def stop_at_the_third(mask_HW, path):
        if len(saved) == 2:
            raise KeyboardInterrupt
        save(mask_HW, path)
        saved.append(path)

    monkeypatch.setattr(mask_folder, "save", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        pseudo.run(config, str(shards.root), weights, tmp_path / "out")
    assert len([*(tmp_path / "out").glob("*.png")]) == 2
    monkeypatch.setattr(mask_folder, "save", save)
    assert written(pseudo.run(config, str(shards.root), weights, tmp_path / "out")) == written(alone)


def test_processes_and_soft_are_no_other_masks(tiny_config, weights, shards, tmp_path):
    first = written(pseudo.run(tiny_config(NO_CRF), str(shards.root), weights, tmp_path / "out"))
    again = written(pseudo.run(tiny_config(NO_CRF, "pseudo.soft=true"), str(shards.root), weights, tmp_path / "out"))
    assert len(again) == 14 and first.items() <= again.items()


# ---------------------------------------------------------------------------------------------------- probabilities


def test_soft_probabilities_are_those_of_the_occurring_classes(tiny_config, tiny_model, weights, shards, tmp_path):
    config = tiny_config(NO_CRF, "pseudo.soft=true")
    out = pseudo.run(config, str(shards.root), weights, tmp_path / "out")
    image_HW3 = np.random.default_rng(3).integers(0, 256, (70, 90, 3), np.uint8)
    image_HW3[0, 0] = 3
    want_KHW = sliding_window.predict(tiny_model().predictor(), image_HW3, config.pseudo, config.data.scale).numpy()
    with np.load(out / "image_3.npz") as found:
        assert found["classes"].tolist() == np.unique(want_KHW.argmax(0)).tolist()
        assert found["probs"].dtype == np.uint8
        np.testing.assert_allclose(found["probs"] / 255, want_KHW[found["classes"]], atol=0.502 / 255)


def test_a_network_that_gives_no_numbers_names_image_and_weights(tiny_config, tiny_model, weights, shards, tmp_path):
    model = tiny_model()
    model.decoder.head.classify.bias.data[1] = float("nan")
    stored.save(model, weights, step=3)
    with pytest.raises(ValueError, match="last.safetensors: image_0: the network's probabilities are not finite numbers"):
        pseudo.run(tiny_config(), str(shards.root), weights, tmp_path / "out")
    assert not written(tmp_path / "out")


def test_images_without_labels_are_background_and_named_once(tiny_config, weights, make_shards, tmp_path, capsys):
    unlabelled = make_shards(tmp_path / "set", 12, 12, classes=(), cam=None, seed=None, mask=None)
    config = tiny_config(NO_CRF, "pseudo.restrict_to_labels=true")
    out = pseudo.run(config, str(unlabelled.root), weights, tmp_path / "out")
    assert not any(mask_folder.read(out, f"image_{n}").any() for n in range(12))
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert "12 images have no label" in line and "image_0, image_1" in line and line.endswith("image_9, ...")


# --------------------------------------------------------------------------------------------------------- want of room


@pytest.mark.parametrize("name", ["image_0.png", "image_0.npz"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half(tiny_config, weights, shards, tmp_path, monkeypatch, name):
    write_bytes = Path.write_bytes

    def fill(path: Path, data: bytes) -> int:
        if not path.name.startswith(name):
            return write_bytes(path, data)
        write_bytes(path, data[:100])
        raise OSError(28, "No space left on device")  # as write(2) fails: without a name

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(OSError, match=f"No space left on device: '.*out/{name}'"):
        pseudo.run(tiny_config("pseudo.soft=true"), str(shards.root), weights, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"about.json", "image_0.npz"} - {name}


def of_torch_on_the_cpu() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), of_torch_on_the_cpu()])
def test_an_image_too_large_is_done_in_parts_and_said_to_be(tiny_config, weights, shards, tmp_path, monkeypatch, capsys, error):
    config = tiny_config(*SCALES)
    want = written(pseudo.run(config, str(shards.root), weights, tmp_path / "want"))
    capsys.readouterr()

    def too_large(*_arguments):
        raise error

    monkeypatch.setattr(sliding_window, "predict_tiles", too_large)
    out = pseudo.run(config, str(shards.root), weights, tmp_path / "out", "0")
    one, strips, *_ = capsys.readouterr().err.splitlines()
    assert one == "image_0: 70 x 90 pixels do not fit into memory; trying again with one window at a time"
    assert strips == "image_0: 70 x 90 pixels do not fit into memory; trying again strip by strip"
    for key in ("image_0", "image_1"):
        assert (mask_folder.read(out, key) == np.array(Image.open(tmp_path / "want" / f"{key}.png"))).mean() > 0.999
    assert {*written(out)} == {name for name in want if "_0" in name or "_1" in name}


def test_an_image_too_large_even_in_parts_is_an_error_that_names_it(tiny_config, weights, shards, tmp_path, monkeypatch):
    def too_large(*_arguments):
        raise MemoryError

    monkeypatch.setattr(sliding_window, "predict_tiles", too_large)
    monkeypatch.setattr(sliding_window, "predict_in_strips", too_large)
    with pytest.raises(ValueError, match="image_0: 70 x 90 pixels do not fit into memory, not even strip by strip"):
        pseudo.run(tiny_config(), str(shards.root), weights, tmp_path / "out")


def test_other_errors_of_the_network_are_not_taken_for_want_of_memory(tiny_config, weights, shards, tmp_path, monkeypatch):
    def wrong(*_arguments):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(sliding_window, "predict_tiles", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        pseudo.run(tiny_config(), str(shards.root), weights, tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------- what is shown


def test_curves_and_the_last_line_say_how_it_went(tiny_config, weights, make_shards, tmp_path, capsys):
    many = make_shards(tmp_path / "set", 25, 25)
    config = tiny_config(NO_CRF)
    out = pseudo.run(config, str(many.root), weights, tmp_path / "pseudo", "0:1")
    board = EventAccumulator(str(Path(config.run) / "tensorboard/pseudo/shards-0-1"), size_guidance={"histograms": 0}).Reload()
    assert {"images_per_second", "entropy", "seed_agreement_percent"} <= {*board.Tags()["scalars"]}
    assert [point.step for point in board.Scalars("entropy")] == [20, 25]
    assert 0 < board.Scalars("entropy")[0].value <= np.log(4)
    seed_HW = np.zeros((48, 64), np.uint8)
    seed_HW[:, :32] = 1
    agreements = [100 * (mask_folder.read(out, f"image_{n}") == seed_HW).mean() for n in range(25)]
    assert board.Scalars("seed_agreement_percent")[0].value == pytest.approx(np.mean(agreements[:20]), abs=1e-3)
    shares = (
        np.mean([np.bincount(mask_folder.read(out, f"image_{n}").ravel(), minlength=4) for n in range(20, 25)], axis=0) / 48 / 64
    )
    assert board.Histograms("classes")[1].histogram_value.bucket == pytest.approx(shares.tolist(), abs=1e-6)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("25 masks, ") and last.endswith(f"{np.mean(agreements):.1f} % of seeded pixels agree on average")


def test_the_stage_counts_masks_and_does_nothing_twice(tiny_config, weights, shards, tmp_path, capsys):
    config = tiny_config(NO_CRF, f"data.train={shards.root}")
    STAGES["pseudo"].run(config, None)
    assert STAGES["pseudo"].progress(config, shards).complete
    capsys.readouterr()
    STAGES["pseudo"].run(config, None)
    assert not capsys.readouterr().err
    assert "processes" not in json.loads((tmp_path / "run/pseudo/about.json").read_text())
