"""Recipes: every published number is the default, and a mistake is named with its cure."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from weakclip.config import Config, ConfigError, CrfConfig, load, save

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted([*FOLDER.glob("*.yaml"), *FOLDER.glob("cam/*.yaml")])

PUBLISHED = {
    "seed": 0,
    "data.scale": [2048, 512],
    "augment.crop": 512,
    "augment.ratio": [0.5, 2.0],
    "augment.max_class_share": 0.75,
    "augment.flip": 0.5,
    "augment.photometric": True,
    "clip.model": "ViT-B-16-quickgelu",
    "clip.image_size": 512,
    "clip.name_tokens": 5,
    "clip.drop_path": 0.1,
    "prompts.length": 8,
    "matching.width": 256,
    "matching.layers": 3,
    "matching.heads": 4,
    "matching.dropout": 0.1,
    "matching.temperature": 0.1,
    "matching.chained": False,
    "decoder.fpn_channels": 256,
    "decoder.head_channels": 256,
    "decoder.dropout": 0.1,
    "loss.grid": [64, 64],
    "loss.balance": True,
    "loss.boundary": True,
    "loss.auxiliary": 0.4,
    "loss.tau": 0.07,
    "optim.lr": 1e-4,
    "optim.weight_decay": 3e-5,
    "optim.warmup": 1500,
    "optim.min_lr": 1e-6,
    "optim.clip_grad": 0.0,
    "train.accumulate": 1,
    "train.validate_every": 500,
    "pseudo.scales": [0.5, 0.75, 1.0, 1.25, 1.5, 1.75],
    "pseudo.flip": True,
    "pseudo.window": 512,
    "pseudo.stride": 341,
    "pseudo.restrict_to_labels": False,
}


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_recipe_of_the_repository_loads(path):
    assert isinstance(load(path), Config)


@pytest.mark.parametrize(
    "name, own",
    [
        ("voc", {"train.steps": 20000, "train.batch": 8, "classes": "voc", "pseudo.crf": CrfConfig(10, 3, 3, 83, 5, 3)}),
        ("coco", {"train.steps": 40000, "train.batch": 6, "classes": "coco", "pseudo.crf": CrfConfig(10, 1, 3, 67, 3, 4)}),
    ],
)
def test_the_recipes_hold_the_published_numbers(repo, name, own):
    config = load(repo / f"configs/{name}.yaml")
    for key, value in (PUBLISHED | own).items():
        found = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value, key


def test_the_defaults_are_those_of_voc(repo):
    assert load(repo / "configs/voc.yaml", ["data.val=null"]) == Config()  # a path alone is no default


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


@pytest.mark.parametrize(
    "override, name",
    [
        ("data.scale=[512]", "data.scale"),
        ("data.workers=-1", "data.workers"),
        ("data.max_bad_samples=-1", "data.max_bad_samples"),
        ("data.shuffle_window=0", "data.shuffle_window"),
        ("seeds.background=1.5", "seeds.background"),
        ("seeds.foreground=0.1", "seeds.foreground"),
        ("augment.crop=0", "augment.crop"),
        ("augment.ratio=[2.0,0.5]", "augment.ratio"),
        ("clip.name_tokens=2", "clip.name_tokens"),
        ("clip.drop_path=1.0", "clip.drop_path"),
        ("data.mix={b: 0}", "data.mix"),
        ("data.mix={b: 0.0001}", "data.mix"),
        ("loss.grid=[64]", "loss.grid"),
        ("loss.ratio_clamp=[2, 1]", "loss.ratio_clamp"),
        ("clip.normalisation=voc", "clip.normalisation"),
        ("clip.taps=[1, 2]", "clip.taps"),
        ("prompts.length=0", "prompts.length"),
        ("decoder.score_map=false", "loss.auxiliary=0"),
        ("matching.width=255", "matching.heads"),
        ("matching.layers=-1", "matching.layers"),
        ("optim.lr=0", "optim.lr"),
        ("optim.min_lr=1", "optim.min_lr"),
        ("train.batch=0", "train.batch"),
        ("train.keep_checkpoints=0", "train.keep_checkpoints"),
        ("pseudo.scales=[]", "pseudo.scales"),
        ("pseudo.stride=600", "pseudo.stride"),
        ("pseudo.window_batch=0", "pseudo.window_batch"),
        ("demo.size=4", "demo.size"),
        ("demo.seeds=none", "demo.seeds"),
        ("precision=fp16", "precision"),
    ],
)
def test_a_value_out_of_range_names_its_key(tmp_path, override, name):
    with pytest.raises(ConfigError, match=name):
        load(written(tmp_path, "seed: 1"), [override])


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
