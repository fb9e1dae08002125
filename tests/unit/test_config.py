"""Settings: every published number is the default, and an error names the key out of range."""

from __future__ import annotations

from pathlib import Path

import pytest

from weakclip.config import Config, ConfigError, CrfConfig
from weakclip.recipe import load

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
    "loss.weights": {"seeding": 1.0, "boundary": 1.0, "auxiliary": 0.4},
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
    assert load(repo / "configs/voc.yaml", ["data.val=null"]) == Config()  # only this path is not a default


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
        ("boundary.ratio_clamp=[2, 1]", "boundary.ratio_clamp"),
        ("clip.normalisation=voc", "clip.normalisation"),
        ("clip.taps=[1, 2]", "clip.taps"),
        ("prompts.length=0", "prompts.length"),
        ("decoder.score_map=false", "loss.weights.auxiliary=0"),
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
