"""The synthetic world's backbones: files that the networks' readers take, and labels that pictures carry."""

import pytest
import torch
from safetensors.torch import load_file

from weakclip.config import AugmentConfig, RetrainConfig
from weakclip.demo import annotator, backbones, state, supply, world
from weakclip.labels import DEMO
from weakclip.networks import build
from weakclip.networks.mctformer import MCTformer

NETWORKS = {
    "deit_tiny": ("segmenter", "deit_tiny_patch16_224"),
    "mit_b0": ("segformer", "b0"),
    "resnet38_narrow": ("resnet38", "narrow"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_backbone_names_things_and_its_file_is_read_like_a_published_one(name, tmp_path):
    backbone = backbones.BACKBONES[name]()
    with torch.inference_mode():
        shape = backbone.maps(torch.zeros(2, 3, 96, 64)).shape
        assert shape[:2] == (2, len(annotator.LABELS)) and 2 * shape[2] == 3 * shape[3]
    backbone.write(tmp_path)
    network, size = NETWORKS[name]
    built = build(RetrainConfig(network, size, augment=AugmentConfig(crop=192)), len(DEMO))
    built.load_pretrained(tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    written = {tensor.sum().item() for key, tensor in found.items() if tensor.ndim == 4 and not key.startswith("fc8.")}
    assert written <= {tensor.sum().item() for tensor in built.state_dict().values()}, "convolutions of the file"


def test_mctformer_begins_from_the_same_file(tmp_path):
    backbones.deit_tiny().write(tmp_path)
    MCTformer(len(DEMO), "deit_tiny_patch16_224", 192).load_pretrained(tmp_path / "model.safetensors")


def test_labels_are_what_a_picture_shows():
    pictures = [world.picture(supply.BACKBONE_SEED, index) for index in range(8)]
    true_BA = annotator.multi_hot([picture.captions for picture in pictures])
    for picture, row in zip(pictures, true_BA, strict=True):
        assert {DEMO.index(name) for name in DEMO[1:] if row[annotator.LABELS.index(name)]} == set(picture.classes)
        assert all(picture.captions.count(label) for label, here in zip(annotator.LABELS, row, strict=True) if here)
        assert len(row.nonzero()) >= 3 * len(picture.classes), "of each thing its name, texture and colour"


def test_a_training_goes_on_from_its_last_save_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "SECONDS", 0)
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    kept = state.State(tmp_path / "training.pt", {"network": network, "optimizer": optimizer})
    assert kept.restore() == {}
    network(torch.ones(2)).sum().backward()
    optimizer.step()
    kept.save(step=7, seconds=1.5)
    other = torch.nn.Linear(2, 2)
    moments = torch.optim.AdamW(other.parameters())
    again = state.State(tmp_path / "training.pt", {"network": other, "optimizer": moments})
    assert again.restore() == {"step": 7, "seconds": 1.5}
    assert other.weight.equal(network.weight) and moments.state_dict()["state"][0]["step"] == 1
    again.remove()
    assert not list(tmp_path.iterdir())
