"""The synthetic world's backbones: files that the networks can read, and labels of images."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from weakclip.config import AugmentConfig, Config, RetrainConfig
from weakclip.demo import annotator, backbones, image_pool, resumable, world
from weakclip.labels import DEMO
from weakclip.networks.mctformer import MCTformer
from weakclip.networks.wrappers import build_segmentation

NETWORKS = {
    "deit_tiny": ("segmenter", "deit_tiny_patch16_224"),
    "mit_b0": ("segformer", "b0"),
    "resnet38_narrow": ("resnet38", "narrow"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_backbones_file_is_read_like_a_published_one(name, tmp_path):
    backbone = backbones.BACKBONES[name]()
    with torch.inference_mode():
        shapes = [found.shape for found in backbone.maps(torch.zeros(2, 3, 192, 128))]
        assert all(shape[0] == 2 and 2 * shape[2] == 3 * shape[3] for shape in shapes)
    backbone.write(tmp_path)
    network, size = NETWORKS[name]
    config = Config(retrain=RetrainConfig(network, size, augment=AugmentConfig(crop=192)))
    built = build_segmentation(config, len(DEMO), pretrained=False).network
    built.load_pretrained(tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    written = {tensor.sum().item() for key, tensor in found.items() if tensor.ndim == 4 and not key.startswith("fc8.")}
    assert written <= {tensor.sum().item() for tensor in built.state_dict().values()}, "convolutions of the file"


def test_the_vit_sees_what_the_small_clip_sees():
    images = np.stack([world.picture(7, index).image for index in range(4)])
    x_B3HW, network = image_pool.network_input(images), backbones.deit_tiny()
    with torch.inference_mode():
        theirs = backbones.last_tokens(backbones.small_clip(), x_B3HW)
        [ours] = network.maps(x_B3HW)
    assert torch.cosine_similarity(ours, theirs).mean() > 0.9
    assert torch.cosine_similarity(ours, theirs.roll(1, 0)).mean() < 0.8  # of other images


def test_mctformer_begins_from_the_same_file(tmp_path):
    backbones.deit_tiny().write(tmp_path)
    MCTformer(len(DEMO), "deit_tiny_patch16_224", 192).load_pretrained(tmp_path / "model.safetensors")


def test_labels_are_what_a_picture_shows():
    pictures = [world.picture(image_pool.BACKBONE_SEED, index) for index in range(8)]
    true_BA = annotator.multi_hot([picture.captions for picture in pictures])
    for picture, row in zip(pictures, true_BA, strict=True):
        assert {DEMO.index(name) for name in DEMO[1:] if row[annotator.LABELS.index(name)]} == set(picture.classes)
        assert all(picture.captions.count(label) for label, here in zip(annotator.LABELS, row, strict=True) if here)
        assert len(row.nonzero()) >= 3 * len(picture.classes), "of each thing its name, texture and colour"


def test_a_training_goes_on_from_its_last_save_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable, "SECONDS", 0)
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    kept = resumable.State(tmp_path / "training.pt", {"network": network, "optimizer": optimizer})
    assert kept.restore() == {}
    network(torch.ones(2)).sum().backward()
    optimizer.step()
    kept.save(step=7, seconds=1.5)
    other = torch.nn.Linear(2, 2)
    moments = torch.optim.AdamW(other.parameters())
    again = resumable.State(tmp_path / "training.pt", {"network": other, "optimizer": moments})
    assert again.restore() == {"step": 7, "seconds": 1.5}
    assert other.weight.equal(network.weight) and moments.state_dict()["state"][0]["step"] == 1
    again.remove()
    assert not list(tmp_path.iterdir())
