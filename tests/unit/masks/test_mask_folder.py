"""The folder of masks: its provenance, and reading the masks."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from weakclip.checkpoints import weights as stored
from weakclip.config import ConfigError
from weakclip.masks import mask_folder
from weakclip.masks.mask_folder import MaskSettings

H, W = 48, 64
TRUTH_HW = np.repeat((np.arange(W) < W // 2).astype(np.uint8)[None], H, axis=0)


# ----------------------------------------------------------------------------------------------------------------- whose masks


def test_the_folder_notes_whose_masks_it_holds(tiny_config, weights, tmp_path):
    config = tiny_config()
    mask_folder.open_for_writing(tmp_path / "out", MaskSettings.of(config), weights)
    about = json.loads((tmp_path / "out/about.json").read_text())
    assert about["scales"] == [1.0] and about["scale"] == [128, 64] and about["crf"]["bilateral_sxy"] == 83
    mask_folder.open_for_writing(tmp_path / "out", MaskSettings.of(config), weights)  # the same again


@pytest.mark.parametrize(
    "override", ["pseudo.scales=[0.5]", "pseudo.crf=null", "pseudo.crf.iterations=3", "data.scale=[64,64]", "pseudo.flip=false"]
)
def test_masks_of_other_settings_are_refused(tiny_config, weights, tmp_path, override):
    mask_folder.open_for_writing(tmp_path / "out", MaskSettings.of(tiny_config()), weights)
    with pytest.raises(ConfigError, match="out holds masks of other weights or settings .*about.json.*; choose another --out"):
        mask_folder.open_for_writing(tmp_path / "out", MaskSettings.of(tiny_config(override)), weights)


def test_the_batch_of_windows_does_not_matter_even_where_an_earlier_version_noted_it(tiny_config, weights, tmp_path):
    out = tmp_path / "out"
    mask_folder.open_for_writing(out, MaskSettings.of(tiny_config("pseudo.window_batch=2")), weights)
    about = json.loads((out / "about.json").read_text())
    assert "window_batch" not in about
    (out / "about.json").write_text(json.dumps({**about, "window_batch": 4}))
    mask_folder.open_for_writing(out, MaskSettings.of(tiny_config()), weights)


def test_masks_of_other_weights_are_refused(tiny_config, tiny_model, weights, tmp_path):
    mask_folder.open_for_writing(tmp_path / "out", MaskSettings.of(tiny_config()), weights)
    stored.save(tiny_model(), weights, step=4)
    with pytest.raises(ConfigError, match="other weights or settings"):
        mask_folder.open_for_writing(tmp_path / "out", MaskSettings.of(tiny_config()), weights)


def test_a_folder_that_another_task_is_just_claiming_is_no_strangers(tiny_config, weights, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/about.json.deadbeef.partial").touch()
    mask_folder.open_for_writing(tmp_path / "out", MaskSettings.of(tiny_config()), weights)
    assert mask_folder.read_provenance(tmp_path / "out") == mask_folder.provenance(MaskSettings.of(tiny_config()), weights)


def test_a_folder_of_other_files_is_refused(tiny_config, weights, tmp_path):
    (tmp_path / "out").mkdir()
    mask_folder.open_for_writing(tmp_path / "out", MaskSettings.of(tiny_config()), weights)  # an empty folder is accepted
    (tmp_path / "out/about.json").rename(tmp_path / "out/photo.png")
    with pytest.raises(ConfigError, match="out holds files that are not pseudo masks; choose another --out"):
        mask_folder.open_for_writing(tmp_path / "out", MaskSettings.of(tiny_config()), weights)


# --------------------------------------------------------------------------------------------------------------------- reading


def test_a_mask_is_read_as_indices_whether_grey_or_palette(tmp_path):
    picture = Image.fromarray(TRUTH_HW * 3)
    picture.save(tmp_path / "grey.png")
    picture.putpalette([9] * 768)
    picture.save(tmp_path / "palette.png")
    for key in ("grey", "palette"):
        np.testing.assert_array_equal(mask_folder.read(tmp_path, key), TRUTH_HW * 3)


def test_a_missing_damaged_or_coloured_mask_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"here.png: missing; write it with python -m weakclip.pseudo"):
        mask_folder.read(tmp_path, "here")
    Image.fromarray(TRUTH_HW).save(tmp_path / "here.png")
    data = (tmp_path / "here.png").read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"no picture"):
        (tmp_path / "here.png").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"here.png: .*; remove it and run python -m weakclip.pseudo again"):
            mask_folder.read(tmp_path, "here")
    Image.new("RGB", (W, H)).save(tmp_path / "here.png")
    with pytest.raises(ValueError, match="here.png: must be an 8-bit palette or grey PNG, is RGB"):
        mask_folder.read(tmp_path, "here")
