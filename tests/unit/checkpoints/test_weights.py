"""The bytes of weight files."""

from __future__ import annotations

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from weakclip.checkpoints import weights


def test_equal_weights_are_equal_files(tiny_model, tmp_path):
    model = tiny_model()
    for number in range(20):
        weights.save(model, tmp_path / f"{number}.safetensors", step=3)
    first, *others = [path.read_bytes() for path in tmp_path.iterdir()]
    assert all(other == first for other in others)


def test_a_packed_file_is_one_that_safetensors_reads(tmp_path):
    tensors = {"b": torch.arange(6.0).reshape(2, 3).T, "ä": torch.ones(3, dtype=torch.int64), "e": torch.empty(0)}
    metadata = {"step": "7", "classes": '["chat", "ours polaire", "été"]', "a": ""}
    path = tmp_path / "packed.safetensors"
    path.write_bytes(weights.packed(tensors, metadata))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata and set(file.keys()) == set(tensors)
