"""Counted operations of a training step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from weakclip.training import flops


@pytest.mark.parametrize("changes", [(), ("decoder.score_map=false", "loss.weights.auxiliary=0")])
def test_the_text_tower_counts_once_a_batch_and_the_model_is_left_as_it_was(tiny_model, changes):
    model = tiny_model(*changes)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alone, shared = (flops.per_image(model, 64, batch) for batch in (1, 8))
    assert alone > shared > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


class Attention(nn.Module):
    """Attention between all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x_B3HW):
        x_B1LD = (self.weight * x_B3HW).repeat(1, 8, 1, 1).flatten(2).transpose(1, 2)[:, None].contiguous()
        return F.scaled_dot_product_attention(x_B1LD, x_B1LD, x_B1LD)


def test_attention_counts_on_every_device():
    assert flops.per_image(Attention(), 6, batch=2) == 6 * 2 * 36 * 36 * 24  # two products forward, four backward


def test_a_cpu_has_no_peak():
    assert flops.peak(torch.device("cpu")) is None
