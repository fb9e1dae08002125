"""The learning rate schedule, the optimizer and the order of checkpoints; training is an integration test."""

from __future__ import annotations

import math

import pytest
import torch

from weakclip.config import Config, OptimConfig, RetrainConfig
from weakclip.networks.wrappers import build_segmentation
from weakclip.runtime.run_dir import RunDir
from weakclip.training.engine import learning_rate_factor, make_optimizer

OPTIM = OptimConfig(lr=1e-4, min_lr=1e-6, warmup=1500)


def test_the_rate_warms_up_from_a_millionth_and_ends_at_the_lowest():
    factors = [learning_rate_factor(step, OPTIM, 20000) for step in range(20001)]
    assert factors[0] == pytest.approx(1e-6)
    assert factors[750] == pytest.approx(0.5 * (0.01 + 0.99 * (1 + math.cos(math.pi * 750 / 20000)) / 2), rel=1e-5)
    assert factors[10000] == pytest.approx(0.01 + 0.99 / 2)
    assert factors[20000] == pytest.approx(0.01)
    assert sorted(factors[:1500]) == factors[:1500] and sorted(factors[1500:], reverse=True) == factors[1500:]


def test_there_is_no_jump_where_the_warm_up_ends():
    before, after = (learning_rate_factor(step, OPTIM, 20000) for step in (1499, 1500))
    assert abs(before - after) < 1e-3 and after < 1


def test_the_rate_stays_at_its_end_and_needs_no_warm_up():
    assert learning_rate_factor(99999, OPTIM, 20000) == pytest.approx(0.01)
    assert learning_rate_factor(0, OptimConfig(warmup=0), 100) == 1.0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("decay, undecayed", [("all", set()), ("weights", {"norm", "bias"})])
def test_weight_decay_spares_what_is_no_weight_of_a_layer(optimizer, decay, undecayed):
    config = Config(precision="fp32", retrain=RetrainConfig("resnet38", "narrow", head_lr=10.0))
    network = build_segmentation(config, 3, pretrained=False)
    made = make_optimizer(network, OptimConfig(optimizer, lr=0.5, weight_decay=0.25, decay=decay))
    kinds = {
        id(module.weight): "norm" if isinstance(module, torch.nn.BatchNorm2d) else "layer"
        for module in network.modules()
        if hasattr(module, "weight")
    }
    spared = {kinds.get(id(p), "bias") for group in made.param_groups for p in group["params"] if not group["weight_decay"]}
    decayed = {kinds.get(id(p), "bias") for group in made.param_groups for p in group["params"] if group["weight_decay"]}
    assert spared == undecayed and decayed == {"layer", "norm", "bias"} - undecayed
    head = {id(p) for p in network.network.head_parameters()}
    assert all(group["lr"] == (5.0 if id(p) in head else 0.5) for group in made.param_groups for p in group["params"])
    assert sum(len(group["params"]) for group in made.param_groups) == len([*network.parameters()])


def test_checkpoints_are_sorted_by_step_and_unfinished_ones_are_none(tmp_path):
    assert RunDir(tmp_path).checkpoints() == []
    (tmp_path / "checkpoints").mkdir()
    for name in ("step-1000", "step-90", "step-200", "step-x", "other"):
        (tmp_path / "checkpoints" / f"{name}.safetensors").touch()
    (tmp_path / "checkpoints" / "step-3000.safetensors.partial").touch()
    assert [path.stem for path in RunDir(tmp_path).checkpoints()] == ["step-90", "step-200", "step-1000"]
