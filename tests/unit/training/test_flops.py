"""Counted operations of a training step."""

from __future__ import annotations

import pytest
import torch

from weakclip.training import flops


@pytest.mark.parametrize("changes", [(), ("decoder.score_map=false", "loss.weights.auxiliary=0")])
def test_the_text_tower_counts_once_a_batch_and_the_model_is_left_as_it_was(tiny_model, changes):
    model = tiny_model(*changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alone, shared = (flops.per_image(model, 64, batch) for batch in (1, 8))
    assert alone > shared > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_a_cpu_has_no_peak():
    assert flops.peak(torch.device("cpu")) is None
