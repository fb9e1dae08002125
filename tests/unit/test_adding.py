"""CONTRIBUTING.md's examples: a loss, a CAM source, a network and a data set, each by one new file and one registry line."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from weakclip import recipe, registry
from weakclip.cams import make
from weakclip.config import BuildConfig
from weakclip.data.index import Index
from weakclip.datasets import build
from weakclip.models.losses import LossInputs, weighted_losses
from weakclip.networks.wrappers import build_segmentation
from weakclip.registry import CamSource, DataSet, NetworkEntry

MODULE = '''
from pathlib import Path

import numpy as np
import torch
from torch import nn

from weakclip.data.sample import Cam
from weakclip.datasets.cam_files import pack_cam, quarter
from weakclip.datasets.items import Item, Listing
from weakclip.networks.base import Network


def class_balanced(inputs):
    """The mean over classes of the mean cross-entropy on their seeded pixels."""
    probs_BKGG, seeds_BGG = inputs.grid.probs_BKGG, inputs.grid.seeds_BGG
    means = [-probs_BKGG[:, k][seeds_BGG == k].log().mean() for k in range(probs_BKGG.shape[1]) if (seeds_BGG == k).any()]
    return torch.stack(means).mean()


def provenance(config):
    return {"cam": {"source": "halves"}}


def maker(config, labelled):
    def cam(sample):
        h, w = quarter(sample.size)
        left_hw = np.zeros((h, w), np.float32)
        left_hw[:, : w // 2] = 1
        return pack_cam({index: left_hw for index in sample.classes}, sample.size, sample.name)

    return cam, {"found": 1}


class OneByOne(Network):
    """A 1x1 convolution."""

    least_side = 1

    def __init__(self, num_classes, width):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, width, 1), nn.Conv2d(width, num_classes, 1)

    def forward(self, images_B3HW):
        return self.head(self.first(images_B3HW))

    def load_pretrained(self, path):
        pass

    def head_parameters(self):
        return [*self.head.parameters()]


def items(build, names):
    """Images whose name begins with their class."""
    found = sorted(Path(build.images).glob("*.png"))
    return Listing(names, [Item(path.stem, path, (names.index(path.stem.split("_")[0]),)) for path in found])
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "weakclip_additions.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "weakclip_additions"
    sys.modules.pop("weakclip_additions", None)


def test_a_loss_is_weighed_by_the_recipe(package, monkeypatch, tiny_config):
    monkeypatch.setitem(registry.LOSSES, "class_balanced", f"{package}:class_balanced")
    config = tiny_config("loss.weights.class_balanced=0.5", "loss.weights.boundary=0", "loss.weights.auxiliary=0").loss
    seeds_BHW = torch.zeros(2, 64, 64, dtype=torch.int64)
    seeds_BHW[:, :8] = 1
    inputs = LossInputs(torch.randn(2, 4, 16, 16), torch.rand(2, 4, 4, 4), seeds_BHW, torch.randn(2, 3, 64, 64), config)
    losses = weighted_losses(inputs)
    log_BKGG, small_BGG = inputs.grid.probs_BKGG.log(), inputs.grid.seeds_BGG
    means = [-log_BKGG[:, k][small_BGG == k].mean() for k in (0, 1)]
    assert list(losses) == ["seeding", "class_balanced"]
    torch.testing.assert_close(losses["class_balanced"], 0.5 * sum(means) / 2)


def test_a_cam_source_makes_a_set_of_shards(package, monkeypatch, tiny_config, make_shards, tmp_path):
    monkeypatch.setitem(registry.CAM_SOURCES, "halves", CamSource(f"{package}:provenance", f"{package}:maker"))
    labelled = make_shards(tmp_path / "labelled", count=3, cam=None, seed=None)
    config = tiny_config("cam.source=halves", f"data.labelled={labelled.root}", f"data.train={tmp_path}/cams")
    make.run(config, None)
    assert make.written(config, labelled) == len(labelled.shards)
    assert Index.load(tmp_path / "cams").entries[0].key == "image_0"


def test_a_network_is_named_by_the_recipe(package, monkeypatch, tiny_config):
    sizes = {"small": {"width": 2}, "large": {"width": 5}}
    monkeypatch.setitem(registry.NETWORKS, "one_by_one", NetworkEntry(f"{package}:OneByOne", "small", sizes))
    for backbone, width in (("null", 2), ("large", 5)):
        config = tiny_config("retrain.network=one_by_one", f"retrain.backbone={backbone}")
        model = build_segmentation(config, 4, pretrained=True)
        assert model.network.first.out_channels == width and model(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 8, 8)


def test_a_data_set_is_built_by_the_command_and_by_the_recipe(package, monkeypatch, tiny_recipe, tmp_path):
    entry = DataSet(f"{package}:items", "images named by their class", {"images": "the images"}, required=("images",))
    monkeypatch.setitem(registry.DATA_SETS, "named", entry)
    (tmp_path / "images").mkdir()
    for name in ("cat_1", "dog_1", "cat_2"):
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
    names = tmp_path / "names.txt"
    names.write_text("background\ncat\ndog\n")
    command = ["named", "--images", str(tmp_path / "images"), "--classes", str(names), "--processes", "1"]
    build.main([*command, "--out", str(tmp_path / "typed")])
    settings = f"data.build={{source: named, images: {tmp_path}/images, processes: 1}}"
    config = recipe.load(tiny_recipe, [settings, f"classes={names}", f"data.train={tmp_path}/recipe"])
    assert config.data.build == BuildConfig(source="named", images=f"{tmp_path}/images", processes=1)
    build.run_part(config, None)
    typed, of_recipe = (Index.load(tmp_path / name) for name in ("typed", "recipe"))
    assert [entry.key for entry in typed.entries] == ["cat_1", "cat_2", "dog_1"] and typed.shards == of_recipe.shards
