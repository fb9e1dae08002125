"""Loading a trained WeakCLIP: the same model again, or a one-line error that names what does not match."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from weakclip.checkpoints.weight_files import ArchiveError
from weakclip.config import ConfigError
from weakclip.models.load import load_weakclip


def test_saved_weights_load_into_the_same_model(tiny_config, tiny_model, weights):
    model, x_B3HW = load_weakclip(tiny_config(), weights), torch.randn(1, 3, 64, 64)
    assert not model.training and not weights.with_name("last.safetensors.partial").exists()
    assert model.cpu()(x_B3HW).logits_BKhw.equal(tiny_model()(x_B3HW).logits_BKhw)


def test_saved_weights_hold_the_trainable_part_alone(tiny_model, weights):
    state = tiny_model().state_dict()
    assert load_file(weights).keys() == state.keys()
    assert weights.stat().st_size < 1.2 * sum(t.numel() * t.element_size() for t in state.values()) + 20_000


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "decoder.head_channels=8",
            r"does not fit; shape mismatch .36.: .* is \[24, 24, 3, 3\], not \[8, 24, 3, 3\], .* and 26 more; use",
        ),
        ("classes=voc", r"made for 4 classes \(K\), but the config has 21; set classes as in its run"),
        ("prompts.length=4", r"does not fit; shape mismatch .1.: prompts_ND is \[8, 32\], not \[4, 32\]; use the config"),
        ("matching.layers=2", r"does not fit; unexpected keys .40.: matching.text_branch.layers.2.* and 30 more; use"),
        ("matching.layers=4", r"does not fit; missing keys .40.: matching.text_branch.layers.3.* and 30 more; use"),
        (
            "clip={model: ViT-B-16-quickgelu, pretrained: none}",
            r"made for 64 channels of the vision tower, but the config has 768",
        ),
    ],
)
def test_weights_of_another_model_are_refused(tiny_config, weights, override, message):
    with pytest.raises(ConfigError, match=f"last.safetensors: {message}") as caught:
        load_weakclip(tiny_config(override), weights)
    assert "\n" not in str(caught.value)


def test_damaged_and_foreign_weights_are_refused(tiny_config, weights):
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ArchiveError, match="last.safetensors: cannot be read as weights .*; was the download complete?"):
        load_weakclip(tiny_config(), weights)
    save_file({"something": torch.zeros(1)}, weights)
    with pytest.raises(
        ConfigError, match="last.safetensors: does not fit; missing keys .*: prompts_ND, .*; unexpected keys .1.: something; use"
    ):
        load_weakclip(tiny_config(), weights)
