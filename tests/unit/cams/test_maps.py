"""Functions that all CAM sources share."""

from __future__ import annotations

import torch

from weakclip.cams import maps


def test_a_map_that_is_the_same_everywhere_becomes_zero():
    maps_nL = torch.tensor([[2.0, 3.0, 6.0], [5.0, 5.0, 5.0]])
    assert maps.stretch(maps_nL).tolist() == [[0, 0.25, 1], [0, 0, 0]]
