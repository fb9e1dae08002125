"""The Python interface, on a tiny random WeakCLIP."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

import weakclip
from weakclip import predict, recipe
from weakclip.config import ConfigError
from weakclip.data.index import ShardError
from weakclip.masks.sliding_window import predict as probabilities
from weakclip.runtime.errors import UserError
from weakclip.runtime.run_dir import RunDir

NO_CRF = "pseudo.crf=null"
IMAGE_HW3 = np.random.default_rng(0).integers(0, 256, (48, 70, 3), np.uint8)


@pytest.fixture
def run(tiny_config, weights):
    """A function: overrides -> the run directory of a trained WeakCLIP."""

    def made(*overrides: str):
        config = tiny_config(*overrides)
        recipe.save(config, config.run_dir.config)
        return config.run_dir.root

    return made


def test_a_prediction_is_that_of_the_stage_pseudo(run, tiny_model, tiny_config):
    network = weakclip.load(run(NO_CRF))
    config = tiny_config(NO_CRF)
    want_KHW = probabilities(tiny_model().predictor(), IMAGE_HW3, config.pseudo, config.data.scale).numpy()
    found = network.predict(IMAGE_HW3)
    assert (found.mask_HW == want_KHW.argmax(0)).all() and found.mask_HW.dtype == np.uint8
    winners = np.unique(found.mask_HW)
    np.testing.assert_array_equal(found.probs_KHW[winners], want_KHW[winners])
    assert not np.delete(found.probs_KHW, winners, axis=0).any()
    assert found.classes == network.classes and found.found == [network.classes[index] for index in winners if index]
    with_crf = weakclip.load(run()).predict(IMAGE_HW3)
    assert with_crf.mask_HW.shape == (48, 70)


def test_files_images_and_arrays_are_the_same_image(run, tmp_path):
    network = weakclip.load(run(NO_CRF))
    Image.fromarray(IMAGE_HW3).save(tmp_path / "a.png")
    want_HW = network.predict(IMAGE_HW3).mask_HW
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(IMAGE_HW3)):
        assert (network.predict(image).mask_HW == want_HW).all()


def test_labels_leave_only_their_classes_and_background(run):
    network = weakclip.load(run(NO_CRF))
    name = network.classes[2]
    assert set(np.unique(network.predict(IMAGE_HW3, labels=[name]).mask_HW)) <= {0, 2}
    assert not network.predict(IMAGE_HW3, labels=[]).mask_HW.any()
    with pytest.raises(UserError, match="labels: 'nothing' is not one of the 3 classes; the closest is"):
        network.predict(IMAGE_HW3, labels=["nothing"])


def test_photos_are_turned_if_those_of_the_training_were(run, tmp_path):
    image = Image.fromarray(IMAGE_HW3)
    image.getexif()[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "a.png", exif=image.getexif())
    assert weakclip.load(run(NO_CRF)).predict(tmp_path / "a.png").mask_HW.shape == (48, 70)
    built = ["data.build.source=folder", f"data.build.images={tmp_path}", "data.build.exif=upright"]
    upright = weakclip.load(run(NO_CRF, *built)).predict(tmp_path / "a.png")
    assert upright.mask_HW.shape == (70, 48)
    np.testing.assert_array_equal(upright.image_HW3, np.rot90(IMAGE_HW3, -1))
    assert weakclip.load(run(NO_CRF), exif="upright").predict(tmp_path / "a.png").mask_HW.shape == (70, 48)


def test_photos_are_turned_if_the_training_set_was_built_so_by_hand(run, tmp_path, make_shards):
    data = make_shards(tmp_path / "set", 2)
    image = Image.fromarray(IMAGE_HW3)
    image.getexif()[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "a.png", exif=image.getexif())
    for built, shape in (("upright", (70, 48)), ("stored", (48, 70))):
        (data.root / "build.json").write_text(json.dumps({"source": "folder", "shards": 1, "exif": built}))
        assert weakclip.load(run(NO_CRF, f"data.train={data.root}")).predict(tmp_path / "a.png").mask_HW.shape == shape


def test_a_retrained_network_is_known_from_any_working_directory(tmp_path, monkeypatch):
    place = tmp_path / "voc/retrain/segformer-seeds"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    assert RunDir(Path(".")).is_retrained("segformer") and RunDir(place).is_retrained("segformer")
    assert not RunDir(tmp_path / "retrain/mine").is_retrained(None) and not RunDir(place).is_retrained("resnet38")


def test_damaged_images_are_skipped_named_and_counted(run, tmp_path, capsys, caplog):
    Image.fromarray(IMAGE_HW3).save(tmp_path / "good.png")
    data = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(SystemExit, match="2 of 3 images cannot be read"):
        predict.main([str(run(NO_CRF)), *(str(tmp_path / name) for name in ("cut.png", "good.png", "text.jpg"))])
    assert "masks and overlays of 1 images" in capsys.readouterr().out
    assert [line.split(": ")[0] for line in caplog.messages] == [str(tmp_path / "cut.png"), str(tmp_path / "text.jpg")]


@pytest.mark.parametrize(
    "image, message",
    [(IMAGE_HW3[..., 0], "uint8 H x W x 3, not uint8 of shape"), (IMAGE_HW3.astype(np.float32), "not float32 of shape")],
)
def test_arrays_of_another_kind_are_refused(run, image, message):
    with pytest.raises(UserError, match=message):
        weakclip.load(run(NO_CRF)).predict(image)


def test_what_is_no_run_or_no_image_is_named(run, tmp_path):
    with pytest.raises(UserError, match="nowhere: not a run directory, for it has no config.yaml"):
        weakclip.load(tmp_path / "nowhere")
    (tmp_path / "a.jpg").write_text("hello")
    network = weakclip.load(run(NO_CRF))
    with pytest.raises(UserError, match="a.jpg: not a JPEG, PNG or WebP image"):
        network.predict(tmp_path / "a.jpg")
    with pytest.raises(FileNotFoundError, match=r"b\.jpg"):
        network.predict(tmp_path / "b.jpg")


def test_importing_the_package_loads_no_torch():
    code = "import sys, weakclip; assert 'torch' not in sys.modules; assert not hasattr(weakclip, 'no_such_name')"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------------------- the command


def test_predict_writes_masks_overlays_and_a_sheet(run, tmp_path, capsys):
    for name in ("a.png", "trip/b.c.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGE_HW3).save(tmp_path / "photos" / name)
    Image.fromarray(IMAGE_HW3).save(tmp_path / "one.jpg")
    place = run(NO_CRF)
    predict.main([str(place), str(tmp_path / "photos"), str(tmp_path / "one.jpg")])
    out = place / "predictions"
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    names = ("a", "trip/b.c", "one")
    assert found == {"sheet.png", *(f"masks/{name}.png" for name in names), *(f"overlays/{name}.jpg" for name in names)}
    with Image.open(out / "masks/a.png") as mask:
        assert mask.mode == "P" and (np.asarray(mask) == weakclip.load(place).predict(IMAGE_HW3).mask_HW).all()
    assert "masks and overlays of 3 images; look at" in capsys.readouterr().out


def test_images_that_are_not_there_or_have_one_name_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.jpg: no such image or folder"):
        predict.images([tmp_path / "none.jpg"])
    with pytest.raises((ConfigError, ShardError), match="holds no"):
        predict.images([tmp_path])
    for name in ("x/a.jpg", "y/a.jpg"):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(IMAGE_HW3).save(tmp_path / name)
    with pytest.raises(ConfigError, match="y/a.jpg: has the same name without its suffix as .*x/a.jpg"):
        predict.images([tmp_path / "x/a.jpg", tmp_path / "y/a.jpg"])
    assert [*predict.images([tmp_path])] == ["x/a", "y/a"]
