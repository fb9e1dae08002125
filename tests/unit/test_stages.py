"""The progress of each stage, for launch/submit.py and launch/status.py."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from weakclip import recipe
from weakclip.config import BuildConfig, ConfigError
from weakclip.data.index import Index
from weakclip.evaluation.metrics import Counts
from weakclip.evaluation.score_files import Scored
from weakclip.masks import mask_folder
from weakclip.masks.mask_folder import MaskSettings
from weakclip.runtime.run_dir import RunDir
from weakclip.stages import STAGES, chain, is_made


@pytest.fixture
def begun(make_shards, tiny_config, tmp_path):
    index = make_shards(tmp_path / "set")
    config = tiny_config(f"data.train={index.root}", "train.steps=40")
    (Path(config.run) / "checkpoints").mkdir(parents=True)
    (Path(config.run) / "weights").mkdir()
    return config, index, Path(config.run)


def test_a_training_is_as_far_as_its_newest_checkpoint(begun):
    config, index, run = begun
    assert not STAGES["train"].progress(config, index).complete
    for step, shown in ((5, "5/40 steps"), (40, "40/40 steps")):
        (run / "checkpoints" / f"step-{step}.safetensors").touch()
        assert str(STAGES["train"].progress(config, index)) == shown
    assert STAGES["train"].progress(config, index).complete


def test_masks_are_counted_if_they_are_of_these_weights_and_settings(begun, tiny_config):
    config, index, run = begun
    assert STAGES["pseudo"].progress(config, index).done == 0
    (run / "weights" / "last.safetensors").write_bytes(b"1")
    mask_folder.open_for_writing(run / "pseudo", MaskSettings.of(config), run / "weights" / "last.safetensors")
    mask_folder.save(np.zeros((48, 64), np.uint8), run / "pseudo" / "image_3.png")
    assert str(STAGES["pseudo"].progress(config, index)) == "1/7 images"
    (run / "weights" / "best.safetensors").write_bytes(b"2")
    with pytest.raises(ConfigError, match="pseudo holds masks of other weights or settings .*remove it, or set run to another"):
        STAGES["pseudo"].progress(config, index)


def test_scores_are_counted_by_shards(begun):
    config, index, run = begun
    assert str(STAGES["evaluate"].progress(config, index)) == "0/3 shards"
    (run / "weights" / "last.safetensors").write_bytes(b"1")
    mask_folder.open_for_writing(run / "pseudo", MaskSettings.of(config), run / "weights" / "last.safetensors")
    Scored.pseudo(RunDir(run)).write_counts("shard-00001.tar", Counts.zero(4))
    assert str(STAGES["evaluate"].progress(config, index)) == "1/3 shards"


def test_another_runs_directory_is_refused(begun, tiny_config):
    config, index, run = begun
    recipe.save(config, run / "config.yaml")
    config.seed = 9
    with pytest.raises(ConfigError, match=r"was started with other settings \(seed: 0 -> 9\)"):
        STAGES["train"].progress(config, index)


@pytest.fixture
def to_build(tiny_config, tmp_path):
    """Makes configs whose shards are to be built, three of five pictures; with further options of shards/build.py."""
    (tmp_path / "images").mkdir()
    for number in range(5):
        Image.new("RGB", (64, 48), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    options = f"source: folder, images: {tmp_path}/images, samples_per_shard: 2, processes: 1"
    return lambda *more: tiny_config(f"data.train={tmp_path}/built", f"data.build={{{options}}}", *more)


def test_shards_are_built_in_parts(to_build):
    config = to_build()
    assert str(STAGES["shards"].progress(config, None)) == "0/3 shards"
    STAGES["shards"].run(config, "0:2")
    assert str(STAGES["shards"].progress(config, None)) == "2/3 shards" and not Path(config.data.train).exists()
    STAGES["shards"].run(config, "2:3")
    assert STAGES["shards"].progress(config, None).complete
    assert [entry.key for entry in Index.load(config.data.train).entries] == ["0", "1", "2", "3", "4"]
    STAGES["shards"].run(config, "0:2")  # by a job that started late
    with pytest.raises(ConfigError, match="built was made with another data.build"):
        STAGES["shards"].progress(to_build("data.build.samples_per_shard=3"), None)


def test_shards_of_another_origin_are_left_alone(to_build, make_shards):
    config = to_build()
    make_shards(Path(config.data.train))
    with pytest.raises(ConfigError, match="built was not made by data.build; remove it, or leave data.build out"):
        STAGES["shards"].progress(config, None)


@pytest.mark.parametrize(
    "build, said",
    [
        ("{}", "data.build.source is null; set it to what the shards are built from"),
        ("{source: folder}", "data.build.images is missing; data.build.source=folder needs it"),
        ("{source: folder, images: x, pace: 3}", "unknown key 'data.build.pace'; the nearest is 'data.build"),
        ("{source: moon}", "data.build.source must be one of coco, voc, folder, is 'moon'"),
        ("{source: folder, images: x, devkit: y}", "data.build.devkit has no effect with data.build.source=folder"),
        ("[folder, --images, x]", "data.build is now a mapping, such as {source: voc, devkit: DIR, split: trainaug}"),
    ],
)
def test_settings_that_build_no_shards_are_one_clear_line(tiny_config, build, said):
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        STAGES["shards"].progress(tiny_config(f"data.build={build}"), None)
    assert "\n" not in str(error.value)


def test_a_chain_begins_with_shards_where_they_are_to_be_built(to_build, tiny_config):
    assert [stage.name for stage in chain(to_build())][:2] == ["shards", "train"]
    assert chain(tiny_config())[0].name == "train"


@pytest.fixture
def to_add_cams(to_build, tmp_path):
    """Makes configs whose shards are to be built at tmp_path/built, as `to_build`, and get CAMs at tmp_path/cams."""
    sets = (f"data.labelled={tmp_path}/built", f"data.train={tmp_path}/cams")
    texts = ("cam.prompts=['{}']", "cam.background_names=[boat]")
    return lambda *more: to_build(*sets, *texts, *more)


def test_cams_are_a_stage_where_a_labelled_set_is_named(to_add_cams):
    config = to_add_cams()
    assert [stage.name for stage in chain(config)] == ["shards", "cam", "train", "pseudo", "evaluate"]
    config.data.build = BuildConfig()
    assert [stage.name for stage in chain(config)][:2] == ["cam", "train"]


def test_a_chain_to_a_network_on_seeds_has_no_weakclip(tiny_config, tmp_path):
    network = ("retrain.network=segformer", f"data.val={tmp_path}/val")
    assert [stage.name for stage in chain(tiny_config(*network))] == ["train", "pseudo", "retrain", "test", "evaluate"]
    assert [stage.name for stage in chain(tiny_config(*network, "retrain.targets=seeds"))] == ["retrain", "test"]


def test_cams_are_made_in_parts_once_there_are_shards(to_add_cams, tmp_path):
    config = to_add_cams()
    assert str(STAGES["cam"].progress(config, None)) == "0/3 shards" and not is_made(config)
    STAGES["shards"].run(config, None)
    assert (tmp_path / "built" / "index.json").is_file() and not Path(config.data.train).exists()
    STAGES["cam"].run(config, "0:2")
    assert str(STAGES["cam"].progress(config, None)) == "2/3 shards" and not is_made(config)
    STAGES["cam"].run(config, "2:3")
    assert STAGES["cam"].progress(config, None).complete and is_made(config)
    assert [entry.key for entry in Index.load(config.data.train).entries] == ["0", "1", "2", "3", "4"]


def test_cams_of_other_settings_or_shards_are_refused(to_add_cams, tmp_path):
    config = to_add_cams()
    STAGES["shards"].run(config, None)
    STAGES["cam"].run(config, "0:1")
    with pytest.raises(ConfigError, match="data.train: .*cams.partial was made with another cam"):
        STAGES["cam"].progress(to_add_cams("cam.flip=true"), None)
    shutil.rmtree(tmp_path / "built")
    assert str(STAGES["cam"].progress(config, None)) == "1/3 shards"  # of shards that must be built again
    with pytest.raises(ConfigError, match="data.train: .*cams.partial was made with another cam"):
        STAGES["cam"].progress(to_add_cams("cam.flip=true"), None)
    Image.new("RGB", (64, 48)).save(tmp_path / "images" / "5.png")
    STAGES["shards"].run(config, None)
    with pytest.raises(ConfigError, match="data.train: .*cams.partial was made with another cam"):
        STAGES["cam"].progress(config, None)


def test_a_recipe_without_a_labelled_set_has_no_cams_to_make(tiny_config):
    with pytest.raises(ConfigError, match="data.labelled is null; set it to the shard set with image labels"):
        STAGES["cam"].progress(tiny_config(), None)
