"""The losses against the released code's values, and in small cases computed by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from weakclip.config import LossConfig
from weakclip.data.photometric import IMAGENET
from weakclip.models.losses import (
    LossInputs,
    auxiliary_loss,
    boundary_loss,
    boundary_target,
    crf_images,
    seeding_loss,
    weighted_losses,
)

CLAMP = (0.05, 20)


def losses_of(*inputs):
    return weighted_losses(LossInputs(*inputs))


@pytest.fixture(scope="module", params=["sq", "rect"])
def case(request, golden) -> dict[str, torch.Tensor]:
    """What went into the released losses, and what came out of them."""
    inputs, outputs = load_file(golden / "inputs.safetensors"), load_file(golden / "outputs.safetensors")
    values = json.loads((golden / "config.json").read_text())["info"]["train"][f"train_{request.param}"]
    name = request.param
    return {
        "images": inputs[f"{name}.img"],
        "seeds": inputs[f"{name}.gt"][:, 0].long(),
        **{key.removeprefix(f"train_{name}."): tensor for key, tensor in outputs.items() if key.startswith(f"train_{name}.")},
        **{key: values[f"{part}.loss_{key}"] for part, key in [("decode", "seeding"), ("decode", "boundary")]},
        "auxiliary": values["aux_identity.loss_ce"],
        "total": values["loss"],
    }


def random_probs(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).softmax(1)


# ------------------------------------------------------------------------------------------- against the released code


def test_losses_of_the_released_logits_are_the_released_losses(case):
    config = LossConfig(grid=[16, 16])
    losses = losses_of(case["logits_at_feature_size"], case["score_map"], case["seeds"], case["images"], config)
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(case[name], rel=1e-5), name
    assert sum(loss.item() for loss in losses.values()) == pytest.approx(case["total"], rel=1e-5)


def test_losses_of_the_released_probabilities_are_the_released_losses(case):
    seeds_BGG = F.interpolate(case["seeds"][:, None].float(), size=(16, 16))[:, 0].long()
    assert seeding_loss(case["probs"], seeds_BGG, balance=True).item() == pytest.approx(case["seeding"], rel=1e-5)
    loss = boundary_loss(case["probs"], case["crf_target_f32"], CLAMP)
    assert loss.item() == pytest.approx(case["boundary"], rel=1e-5)
    assert 0.4 * auxiliary_loss(case["score_map"], case["seeds"], 0.07).item() == pytest.approx(case["auxiliary"], rel=1e-5)


def test_the_crfs_image_is_the_released_one_bit_by_bit(case):
    images_BGG3 = crf_images(case["images"], (16, 16), IMAGENET, truncate=True)
    np.testing.assert_array_equal(images_BGG3, case["crf_image_uint8"])


def test_the_target_is_the_released_one(case):
    target_BKGG = boundary_target(case["probs"], case["crf_image_uint8"], "lattice")
    torch.testing.assert_close(target_BKGG, case["crf_target_f32"], rtol=0, atol=1e-3)
    torch.testing.assert_close(target_BKGG.sum(1), torch.ones_like(target_BKGG[:, 0]))


# ------------------------------------------------------------------------------------------------------------ seeding

# Two images of four pixels; p of the seeded class is 0.5 except at the first image's only foreground pixel, where it is 0.25.
PROBS = torch.full((2, 3, 2, 2), 0.25)
PROBS[:, 0] = 0.5
SEEDS = torch.tensor([[[0, 0], [1, 255]], [[0, 255], [255, 255]]])


def test_balanced_seeding_averages_foreground_and_background_apart_image_by_image():
    background = math.log(2)  # both images
    foreground = (math.log(4) + 0) / 2  # the second image has none, but counts in the mean over images
    assert seeding_loss(PROBS, SEEDS, balance=True).item() == pytest.approx(background + foreground)


def test_plain_seeding_is_the_mean_over_seeded_pixels():
    assert seeding_loss(PROBS, SEEDS, balance=False).item() == pytest.approx((3 * math.log(2) + math.log(4)) / 4)


@pytest.mark.parametrize("balance", [True, False])
def test_without_a_seed_seeding_is_zero_and_without_gradient(balance):
    probs = random_probs(1, 3, 2, 2).requires_grad_()
    loss = seeding_loss(probs, torch.full((1, 2, 2), 255), balance)
    loss.backward()
    assert loss.item() == 0 and not probs.grad.any()


@pytest.mark.parametrize("balance", [True, False])
def test_ignored_pixels_get_no_seeding_gradient(balance):
    probs = PROBS.clone().requires_grad_()
    seeding_loss(probs, SEEDS, balance).backward()
    reached_BGG = probs.grad.abs().sum(1) > 0
    assert reached_BGG.equal(SEEDS != 255)


# ----------------------------------------------------------------------------------------------------------- boundary


def test_boundary_is_the_divergence_by_hand():
    target, probs = torch.tensor([0.8, 0.2]).view(1, 2, 1, 1), torch.tensor([0.4, 0.6]).view(1, 2, 1, 1)
    assert boundary_loss(probs, target, CLAMP).item() == pytest.approx(0.8 * math.log(2) + 0.2 * math.log(1 / 3), rel=1e-6)


# Ratios 50, 0.01 and 1.
FAR = torch.tensor([0.5, 0.004, 0.1]).view(1, 3, 1, 1), torch.tensor([0.01, 0.4, 0.1]).view(1, 3, 1, 1)


def test_outside_the_clamp_there_is_no_gradient():
    target, probs = FAR[0], FAR[1].clone().requires_grad_()
    loss = boundary_loss(probs, target, CLAMP)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * math.log(20) + 0.004 * math.log(0.05), rel=1e-5)
    assert (probs.grad.flatten() != 0).tolist() == [False, False, True]


def test_without_a_clamp_it_is_the_plain_divergence():
    target, probs = FAR[0], FAR[1].clone().requires_grad_()
    loss = boundary_loss(probs, target, None)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * math.log(50) + 0.004 * math.log(0.01), rel=1e-5)
    torch.testing.assert_close(probs.grad, -target / probs.detach())


def test_the_target_is_a_constant():
    logits = torch.randn(1, 3, 8, 8, requires_grad=True)
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    seeds = torch.randint(0, 3, (1, 32, 32))
    losses_of(logits, torch.rand(1, 3, 2, 2), seeds, images, LossConfig(grid=[8, 8]))["boundary"].backward()
    assert images.grad is None and logits.grad.isfinite().all()


def test_the_crfs_image_is_cut_or_rounded_to_8_bit():
    images = IMAGENET.apply(torch.tensor([10.75, 20.25, 200.6]).view(1, 3, 1, 1).expand(1, 3, 4, 4))
    assert (crf_images(images, (2, 2), IMAGENET, truncate=True) == torch.tensor([10, 20, 200])).all()
    assert (crf_images(images, (2, 2), IMAGENET, truncate=False) == torch.tensor([11, 20, 201])).all()


# ---------------------------------------------------------------------------------------------------------- auxiliary


def test_auxiliary_counts_ignored_pixels_as_zero_in_the_mean_over_all():
    scores = torch.tensor([0.2, -0.1]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    seeds = torch.tensor([[[0, 1], [255, 255]]])
    nll = torch.tensor([0.2, -0.1]).div(0.1).log_softmax(0).neg()
    assert auxiliary_loss(scores, seeds, 0.1).item() == pytest.approx(nll.sum().item() / 4, rel=1e-6)


def test_auxiliary_resizes_the_scores_to_the_seeds(case):
    scores = case["score_map"]
    big = F.interpolate(scores, size=case["seeds"].shape[1:], mode="bilinear", align_corners=False)
    assert auxiliary_loss(scores, case["seeds"], 0.07).item() == pytest.approx(
        auxiliary_loss(big, case["seeds"], 0.07).item(), rel=1e-5
    )


# --------------------------------------------------------------------------------------------------------- all of them


def some_losses(config: LossConfig, side: int = 16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    seeds = torch.randint(0, 3, (2, 64, 64))
    return losses_of(torch.randn(2, 3, side, side), torch.rand(2, 3, 4, 4), seeds, torch.randn(2, 3, 64, 64), config)


def test_losses_are_switched_by_the_config():
    assert list(some_losses(LossConfig(grid=[16, 16]))) == ["seeding", "boundary", "auxiliary"]
    assert list(some_losses(LossConfig(grid=[16, 16], weights={"seeding": 1.0}))) == ["seeding"]
    once, twice = (
        some_losses(LossConfig(grid=[16, 16])),
        some_losses(LossConfig(grid=[16, 16], weights={"seeding": 1.0, "boundary": 1.0, "auxiliary": 0.8})),
    )
    assert twice["auxiliary"].item() == pytest.approx(2 * once["auxiliary"].item())


@pytest.mark.parametrize(
    "grid, side, choice, aligned",
    [
        ([15, 15], 31, None, True),
        ([15, 21], 32, None, True),
        ([16, 16], 31, None, False),
        ([15, 16], 32, None, False),
        ([16, 16], 32, True, True),
    ],
)
def test_corners_are_aligned_exactly_on_an_odd_grid_unless_told_otherwise(grid, side, choice, aligned):
    torch.manual_seed(0)
    logits, seeds = torch.randn(1, 3, side, side), torch.randint(0, 3, (1, 64, 64))
    config = LossConfig(grid=grid, align_corners=choice, weights={"seeding": 1.0})
    found = losses_of(logits, torch.rand(1, 3, 4, 4), seeds, torch.randn(1, 3, 64, 64), config)["seeding"]
    resized = F.interpolate(logits, size=tuple(grid), mode="bilinear", align_corners=aligned)
    seeds_BGG = F.interpolate(seeds[:, None].float(), size=tuple(grid))[:, 0].long()
    assert found.item() == pytest.approx(seeding_loss(resized.softmax(1), seeds_BGG, True).item(), rel=1e-5)


def test_certain_logits_and_bf16_stay_finite():
    logits = torch.tensor([1e4, -1e4, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8).bfloat16().requires_grad_()
    seeds, images = torch.ones(1, 32, 32, dtype=torch.int64), torch.randn(1, 3, 32, 32)
    losses = losses_of(logits, torch.zeros(1, 3, 2, 2).bfloat16(), seeds, images, LossConfig(grid=[8, 8]))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values()) and logits.grad.isfinite().all()
