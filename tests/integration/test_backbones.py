"""Two steps of the trainings that made the synthetic world's weights, on their real pool of images."""

from __future__ import annotations

import pytest
import torch

from weakclip.config import ConfigError
from weakclip.demo import annotator, backbones


def test_a_backbone_learns_what_the_small_clip_sees(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    network = torch.nn.Conv2d(3, 8, 16, 16)
    before = network.weight.clone()
    monkeypatch.setitem(backbones.BACKBONES, "mit_b0", lambda: backbones.Backbone(network, lambda x: [network(x)], write))

    def write(folder):
        (folder / "model.safetensors").touch()

    backbones.main(["--out", str(tmp_path), "--only", "mit_b0", "--steps", "2"])
    assert [path.name for path in (tmp_path / "mit_b0").iterdir()] == ["model.safetensors"]
    assert not network.weight.equal(before)
    backbones.main(["--out", str(tmp_path), "--only", "mit_b0"])
    assert f"{tmp_path}/mit_b0 exists, skipped" in caplog.messages


def test_the_annotator_is_trained_into_a_file(tmp_path):
    file = tmp_path / "annotator.safetensors"
    with pytest.raises(ConfigError, match=f"train it with: python -m weakclip.demo.annotator --out {file}"):
        annotator.load(file)
    annotator.main(["--out", str(file), "--steps", "2"])
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert annotator.load(file)(torch.zeros(1, 3, 32, 32)).shape == (1, len(annotator.LABELS), 4, 4)
