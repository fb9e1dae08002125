"""The settings that each training job takes from the recipe, and refused recipes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from weakclip.config import ConfigError
from weakclip.data.index import ShardError
from weakclip.data.photometric import IMAGENET
from weakclip.data.reading import read_entry
from weakclip.data.sample import open_sample
from weakclip.labels import IGNORE
from weakclip.masks import mask_folder
from weakclip.masks.mask_folder import MaskSettings
from weakclip.models.interface import Targets
from weakclip.networks.base import Network
from weakclip.networks.mctformer import MCTformer
from weakclip.networks.wrappers import Classification, Segmentation
from weakclip.training import jobs
from weakclip.training.claim import claim, require_same_settings
from weakclip.training.tasks import task_of


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("tasks") / "set", count=3, per_shard=2)


@pytest.fixture
def config(tiny_config, shards):
    """Of a run whose masks were begun, to retrain on."""
    config = tiny_config(f"data.train={shards.root}", "retrain.network=segformer", "retrain.backbone=b0")
    weights = Path(config.run).with_name("weights")
    weights.write_bytes(b"1")
    mask_folder.open_for_writing(Path(config.run) / "pseudo", MaskSettings.of(config), weights)
    return config


def put(config, key: str, mask_HW) -> None:
    mask_folder.save(np.asarray(mask_HW, np.uint8), Path(config.run) / "pseudo" / f"{key}.png")


def opened(shards, number: int):
    entry = shards.entries[number]
    return open_sample(read_entry(shards, entry), entry, len(shards.classes))


# ------------------------------------------------------------------------------------------------------ the recipe's part


def test_each_job_has_its_own_directory_and_settings(tiny_config, shards, tmp_path):
    config = tiny_config(
        "retrain.network=resnet38", "retrain.optim.lr=0.5", "retrain.train.steps=7", "retrain.augment.crop=96",
        "retrain.test.scales=[2.0]", f"data.labelled={shards.root}", "cam.source=mctformer", f"data.train={tmp_path}/cams",
        "classify.train.steps=9", "classify.optim.lr=0.25", "classify.augment.crop=80",
    )  # fmt: skip
    found = [jobs.refine(config), jobs.retrain(config), jobs.classify(config)]
    run = tmp_path / "run"
    assert [job.run.root for job in found] == [run, run / "retrain/resnet38", run / "classify"]
    assert [job.optim.lr for job in found] == [1e-4, 0.5, 0.25]
    assert [job.train.steps for job in found] == [20, 7, 9]
    assert [job.augment.crop for job in found] == [64, 96, 80]
    assert found[1].inference.scales == [2.0] and found[2].data.train == str(shards.root)
    assert all(job.recipe is config for job in found)


def test_a_recipe_without_such_a_job_says_which_key_names_it(tiny_config):
    with pytest.raises(ConfigError, match="retrain.network is null; set it to the network to train"):
        jobs.retrain(tiny_config())
    with pytest.raises(ConfigError, match="set cam.source to mctformer, and data.labelled"):
        jobs.classify(tiny_config("cam.source=mctformer"))


@pytest.mark.parametrize(
    "override, message",
    [
        ("retrain.network=unet", "retrain.network must be one of resnet38, segmenter, segformer"),
        ("retrain.targets=masks", "retrain.targets must be pseudo or seeds"),
        ("retrain.test.restrict_to_labels=true", "retrain.test.restrict_to_labels must be false: test images have no labels"),
        ("retrain.optim.optimizer=adam", "optim.optimizer must be adamw or sgd"),
        ("classify.drop_path=1", "classify.drop_path must lie in 0..1"),
        ("cam.source=hope", "cam.source must be one of clip, mctformer, is 'hope'"),
    ],
)
def test_a_value_that_is_none_is_refused(tiny_config, override, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(override)


def test_only_what_a_job_is_made_of_must_stay_the_same(config):
    claim(jobs.retrain(config), resume=False)
    others = replace(config, loss=replace(config.loss, tau=1.0), retrain=replace(config.retrain, test=config.pseudo))
    require_same_settings(jobs.retrain(others))
    changed = replace(config, retrain=replace(config.retrain, backbone="b1"))
    with pytest.raises(ConfigError, match=r"was started with other settings \(retrain.backbone: b0 -> b1\)"):
        require_same_settings(jobs.retrain(changed))


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["augment.crop=100"], "augment.crop is 100; it must be a multiple of the patch, 16: the nearest are 96 and 112"),
        (["augment.crop=8"], "augment.crop is 8; .*: the nearest are 16 and 32"),
        (["clip.model=ViT-L-14-336", "augment.crop=512"], "augment.crop is 512; .* patch, 14: the nearest are 504 and 518"),
        (["clip.model=ViT-B-16-quickgelu", "augment.crop=500"], "augment.crop is 500; .*: the nearest are 496 and 512"),
        (["clip.pretrained=demo", "augment.crop=90"], "augment.crop is 90; .*: the nearest are 80 and 96"),
    ],
)
def test_a_crop_of_no_whole_patches_is_refused_by_the_names_in_the_recipe(tiny_config, overrides, message):
    with pytest.raises(ConfigError, match=message):
        jobs.check_crop(jobs.refine(tiny_config(*overrides)))


def test_a_crop_of_no_whole_patches_is_refused_for_mctformer_and_allowed_for_other_networks(tiny_config):
    changes = ("data.labelled=labelled", "cam.source=mctformer", "classify.augment.crop=100", "retrain.network=segformer")
    config = tiny_config(*changes, "retrain.augment.crop=100")
    with pytest.raises(
        ConfigError, match="classify.augment.crop is 100; it must be a multiple of the patch, 16: the nearest are"
    ):
        jobs.check_crop(jobs.classify(config))
    jobs.check_crop(jobs.retrain(config))


def test_a_patch_that_only_the_weights_tell_is_checked_when_the_network_is_built(tiny_config, tiny_clip, tmp_path):
    config = tiny_config("clip.model=null", f"clip.pretrained={tmp_path}/one.safetensors", "augment.crop=100")
    state, architecture = load_file(tiny_clip / "open_clip_model.safetensors"), (tiny_clip / "open_clip_config.json").read_text()
    save_file(state, tmp_path / "one.safetensors", {"model_cfg": json.dumps(json.loads(architecture)["model_cfg"])})
    jobs.check_crop(jobs.refine(config))
    with pytest.raises(
        ConfigError, match="augment.crop is 100; it must be a multiple of the patch, 16: the nearest are 96 and 112"
    ):
        task_of(jobs.refine(config)).build(pretrained=True)


# ----------------------------------------------------------------------------------------------------------------- targets


def test_missing_pseudo_masks_are_counted_before_anything_is_trained(config, shards):
    put(config, "image_1", np.zeros((48, 64)))
    with pytest.raises(ConfigError, match=r"pseudo: 2 of 3 pseudo masks are missing, the first image_0.png; write them with"):
        task_of(jobs.retrain(config)).inputs([shards])
    for number in (0, 2):
        put(config, f"image_{number}", np.zeros((48, 64)))
    first = task_of(jobs.retrain(config)).inputs([shards])
    about = Path(config.run) / "pseudo" / "about.json"
    about.write_text(about.read_text().replace("weights", "Weights"))
    assert len(first) == 1 and task_of(jobs.retrain(config)).inputs([shards]) != first  # other masks belong to another run


def test_a_retraining_is_towards_the_pseudo_mask(config, shards):
    mask_HW = np.random.default_rng(0).integers(0, 4, (48, 64))
    mask_HW[0] = IGNORE
    put(config, "image_0", mask_HW)
    np.testing.assert_array_equal(task_of(jobs.retrain(config)).target(opened(shards, 0)), mask_HW)


def test_a_retraining_on_seeds_needs_no_pseudo_mask(tiny_config, shards, make_shards, tmp_path):
    config = tiny_config("retrain.network=segformer", "retrain.targets=seeds")
    task = task_of(jobs.retrain(config))
    assert task.job.run.root == tmp_path / "run/retrain/segformer-seeds" and task.inputs([shards]) == []
    left_HW = np.repeat([[1] * 32 + [0] * 32], 48, axis=0)
    np.testing.assert_array_equal(task.target(opened(shards, 0)), left_HW)
    of_cams = make_shards(tmp_path / "cams", count=1, seed=None)
    np.testing.assert_array_equal(task.target(opened(of_cams, 0)), left_HW)


def test_a_retraining_on_seeds_resumes_with_the_same_ones_alone(tiny_config):
    claim(jobs.retrain(tiny_config("retrain.network=segformer", "retrain.targets=seeds")), resume=False)
    others = jobs.retrain(tiny_config("retrain.network=segformer", "retrain.targets=seeds", "seeds.foreground=0.6"))
    with pytest.raises(ConfigError, match=r"was started with other settings \(seeds.foreground: 0.45 -> 0.6\)"):
        require_same_settings(others)


@pytest.mark.parametrize(
    "mask_HW, message",
    [
        (np.zeros((64, 48)), "image_0.png: 48 x 64, but the image is 64 x 48"),
        (np.full((48, 64), 4), "image_0.png: holds class 4, but there are 4 classes"),
        (None, "image_0.png: missing; write it with"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(config, shards, mask_HW, message):
    if mask_HW is not None:
        put(config, "image_0", mask_HW)
    with pytest.raises(ShardError, match=message):
        task_of(jobs.retrain(config)).target(opened(shards, 0))


def test_a_damaged_mask_is_named(config, shards):
    put(config, "image_0", np.zeros((48, 64)))
    path = Path(config.run) / "pseudo" / "image_0.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ShardError, match=r"image_0.png: .*remove it and run"):
        task_of(jobs.retrain(config)).target(opened(shards, 0))
    Image.new("RGB", (64, 48)).save(path)
    with pytest.raises(ShardError, match=r"image_0.png: must be an 8-bit palette or grey PNG, is RGB"):
        task_of(jobs.retrain(config)).target(opened(shards, 0))


def test_a_classifier_needs_no_seed(config, shards, tmp_path):
    data = replace(config.data, train=str(tmp_path / "cams"), labelled=str(shards.root))
    cam = replace(config.cam, source="mctformer")
    labelled = replace(config, cam=cam, data=data)
    assert (task_of(jobs.classify(labelled)).target(opened(shards, 0)) == IGNORE).all()


# ---------------------------------------------------------------------------------------------------------------- training


class Fixed(Network):
    """Logits that are its parameter, whatever the image; its second parameter is the head."""

    least_side = 1

    def __init__(self, logits_Khw: torch.Tensor) -> None:
        super().__init__()
        self.body, self.head = torch.nn.Parameter(logits_Khw), torch.nn.Parameter(torch.zeros(()))

    def forward(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        return (self.body + self.head).expand(len(images_B3HW), -1, -1, -1)

    def load_pretrained(self, path: Path) -> None:
        raise NotImplementedError

    def head_parameters(self) -> list[torch.nn.Parameter]:
        return [self.head]


def targets(seeds_BHW: torch.Tensor) -> Targets:
    return Targets(torch.zeros(len(seeds_BHW), 3, *seeds_BHW.shape[1:]), seeds_BHW, torch.zeros(len(seeds_BHW), 2))


def test_the_loss_is_the_mean_cross_entropy_of_labelled_pixels_at_the_images_size():
    network = Segmentation(Fixed(torch.tensor([0.0, 1.0])[:, None, None].expand(2, 2, 2).clone()), 2, 10.0, "fp32")
    seeds_BHW = torch.full((1, 8, 8), IGNORE)
    seeds_BHW[0, 0, :4], seeds_BHW[0, 1, :2] = 0, 1
    given = targets(seeds_BHW)
    (loss,) = network.losses(network(given.images_B3HW), given).values()
    zero, one = torch.tensor([0.0, 1.0]).log_softmax(0)
    torch.testing.assert_close(loss, -(4 * zero + 2 * one) / 6)
    nothing = targets(torch.full((1, 8, 8), IGNORE))
    (loss,) = network.losses(network(nothing.images_B3HW), nothing).values()
    assert loss == 0


def test_the_head_has_its_own_rate_and_every_parameter_one():
    network = Segmentation(Fixed(torch.zeros(2, 2, 2)), 2, 10.0, "fp32")
    groups = network.groups()
    assert [group.lr for group in groups] == [1.0, 10.0] and network.normalisation == IMAGENET
    assert [[*map(id, group.parameters)] for group in groups] == [[id(network.network.body)], [id(network.network.head)]]


def test_class_tokens_and_patch_head_have_their_own_rate():
    network = Classification(MCTformer(3, "deit_tiny_patch16_224", 64), 10.0, "fp32")
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    rest, head = network.groups()
    assert (rest.lr, head.lr) == (1.0, 10.0)
    assert {names[id(p)] for p in head.parameters} == {"network.cls_token", "network.head.weight", "network.head.bias"}
    assert len(rest.parameters) + len(head.parameters) == len(names)
