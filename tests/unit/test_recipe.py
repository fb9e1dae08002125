"""Reading and saving recipes: an error names the mistake and how to mend it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from weakclip import recipe
from weakclip.config import Config, ConfigError
from weakclip.recipe import load, save
from weakclip.runtime.run_dir import RunDir


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text, key, nearest",
    [
        ("train: {bacth: 4}", "train.bacth", "train.batch"),
        ("optimizer: {lr: 1}", "optimizer", "optim"),
        ("pseudo: {crf: {srgb: 4}}", "pseudo.crf.srgb", "pseudo.crf"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(tmp_path, text, key, nearest):
    with pytest.raises(ConfigError, match=f"recipe.yaml: unknown key '{key}'; the nearest is '{nearest}"):
        load(written(tmp_path, text))


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.bacth=4", "train.bacth=4: unknown key 'train.bacth'; the nearest is 'train.batch'"),
        ("train.batch=many", "train.batch=many: train.batch: .*many.*[Ii]nteger"),
        ("train.batch=[1", "train.batch="),
        ("train.batch", "'train.batch': an override is written key.sub=value"),
        ("--train.batch=4", "'--train.batch=4': an override is written key.sub=value"),
        ("augment.photometric=7.5", "augment.photometric"),
        ("data.scale=512", "data.scale"),
        ("train=5", "train"),
        ("=5", "="),
    ],
)
def test_an_override_that_cannot_be_taken_is_named(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(written(tmp_path, "seed: 1"), [override])
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml: no such config file"):
        load(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="no such config file"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["train: {batch: 4", "train: [", "a: b: c", "\tseed: 1", "- 1\n- 2", "just words"])
def test_what_is_no_recipe_is_one_line_that_names_the_file(tmp_path, text):
    with pytest.raises(ConfigError, match="recipe.yaml: ") as caught:
        load(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_overrides_beat_the_file_and_the_last_one_wins(tmp_path):
    config = load(written(tmp_path, "train: {batch: 4, steps: 7}"), ["train.batch=5", "train.batch=6", "pseudo.crf=null"])
    assert (config.train.batch, config.train.steps, config.pseudo.crf) == (6, 7, None)


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load(written(tmp_path, "")) == Config()


@pytest.mark.parametrize("overrides", [[], ["pseudo.crf=null", "data.val=null", "clip.model=null", "optim.lr=0.3", "run=a b"]])
def test_what_is_saved_loads_as_the_same_config(tmp_path, overrides):
    config = load(written(tmp_path, "train: {batch: 3}"), overrides)
    save(config, tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml") == config


def test_a_saved_recipe_has_its_references_resolved(repo, tmp_path):
    config = load(repo / "configs/demo.yaml", ["run=elsewhere"])
    assert config.data.train == "elsewhere/shards/train"
    save(config, tmp_path / "saved.yaml")
    assert OmegaConf.load(tmp_path / "saved.yaml").data.train == "elsewhere/shards/train"


# ------------------------------------------------------------------------------------------------------------- old keys


@pytest.mark.parametrize(
    "text, said",
    [
        ("cam: {data: labelled}", "cam.data was renamed; use data.labelled"),
        ("cam: {data: null}", "cam.data was renamed; use data.labelled"),
        ("loss: {boundary: false}", "loss.boundary was renamed; use loss.weights.boundary"),
        ("loss: {auxiliary: 0.2}", "loss.auxiliary was renamed; use loss.weights.auxiliary"),
        (
            "data: {build: [folder, --images, x]}",
            "data.build is now a mapping, such as {source: voc, devkit: DIR, split: trainaug}",
        ),
    ],
)
def test_a_key_of_an_earlier_version_names_the_new_one(tmp_path, text, said):
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, text))
    assert str(caught.value) == f"{tmp_path}/recipe.yaml: {said}"


@pytest.mark.parametrize(
    "override, said",
    [
        ("cam.data=labelled", "cam.data was renamed; use data.labelled"),
        ("loss.boundary=false", "loss.boundary was renamed; use loss.weights.boundary"),
        ("loss.auxiliary=0", "loss.auxiliary was renamed; use loss.weights.auxiliary"),
        ("data.build=[voc]", "data.build is now a mapping, such as {source: voc, devkit: DIR, split: trainaug}"),
    ],
)
def test_an_override_of_an_earlier_version_names_the_new_key(tmp_path, override, said):
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, "seed: 1"), ["train.batch=2", override])
    assert str(caught.value) == f"{override}: {said}"


def test_every_renamed_key_is_named_by_one_that_there_is(tmp_path):
    values = {
        "data.labelled": "labelled", "loss.weights.boundary": 0.5, "loss.weights.auxiliary": 0.5,
        "boundary.ratio_clamp": [0.1, 10], "boundary.truncate_image": False,
    }  # fmt: skip
    assert {*recipe.RENAMED.values()} == values.keys()
    for old, new in recipe.RENAMED.items():
        with pytest.raises(ConfigError, match=f"^{old}=1: {old} was renamed; use {new}$"):
            load(written(tmp_path, ""), [f"{old}=1"])
        assert load(written(tmp_path, ""), [f"{new}={values[new]}"]) != Config()


@pytest.mark.parametrize("clamp", [[0.1, 10.0], None])
def test_a_run_of_an_earlier_version_keeps_its_settings_under_their_new_names(tmp_path, clamp):
    run = RunDir(tmp_path)
    saved = {"cam": {"data": "set"}, "loss": {"boundary": True, "auxiliary": 0, "ratio_clamp": clamp, "truncate_image": False}}
    run.config.write_text(yaml.safe_dump(saved))
    config = recipe.load_saved(run)
    assert config.data.labelled == "set" and config.loss.weights == {"seeding": 1.0, "boundary": 1.0, "auxiliary": 0.0}
    assert (config.boundary.ratio_clamp, config.boundary.truncate_image) == (clamp, False)
