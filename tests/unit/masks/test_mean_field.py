"""The exact mean field against its definition, against itself in float64, and near pydensecrf's lattice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weakclip.config import CrfConfig
from weakclip.masks.crf import BOUNDARY, dense_crf
from weakclip.masks.mean_field import mean_field


def smooth_case(count: int, classes: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities that vary slowly, and images with two flat colours and noise."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, classes, 4, 4, generator=generator)
    probs = torch.nn.functional.interpolate(3 * logits, size=(side, side), mode="bicubic").softmax(1).clamp(min=1e-4)
    images = torch.randint(0, 40, (count, side, side, 3), generator=generator)
    images[:, :, side // 3 :] += 120
    return probs, images.byte()


def by_definition(probs_KHW, image_HW3, config: CrfConfig) -> np.ndarray:
    """Mean-field inference pixel pair by pixel pair."""
    K, H, W = probs_KHW.shape
    places = [(y, x) for y in range(H) for x in range(W)]
    kernels = np.zeros((2, H * W, H * W))
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places):
            near = (y - v) ** 2 + (x - u) ** 2
            alike = sum((float(image_HW3[y, x, c]) - float(image_HW3[v, u, c])) ** 2 for c in range(3))
            kernels[0, i, j] = np.exp(-near / (2 * config.gaussian_sxy**2))
            kernels[1, i, j] = np.exp(-near / (2 * config.bilateral_sxy**2) - alike / (2 * config.bilateral_srgb**2))
    sums = kernels.sum(2)
    kernels /= np.sqrt(sums[:, :, None] * sums[:, None, :])
    unary = np.log(np.clip(probs_KHW, 1e-5, 1)).reshape(K, -1)
    q = np.exp(unary) / np.exp(unary).sum(0)
    for _ in range(config.iterations):
        field = unary + config.gaussian_compat * q @ kernels[0] + config.bilateral_compat * q @ kernels[1]
        q = np.exp(field - field.max(0)) / np.exp(field - field.max(0)).sum(0)
    return q.reshape(K, H, W)


@pytest.mark.parametrize("config", [BOUNDARY, CrfConfig(gaussian_sxy=2, gaussian_compat=5, bilateral_srgb=30, iterations=3)])
def test_it_is_the_definition(config):
    probs, images = smooth_case(1, 3, 6)
    found = mean_field(probs.double(), images, config)[0]
    np.testing.assert_allclose(found.numpy(), by_definition(probs[0].numpy(), images[0].numpy(), config), atol=1e-6)


def test_fp32_is_precise():
    probs, images = smooth_case(2, 21, 24)
    difference = mean_field(probs, images, BOUNDARY) - mean_field(probs.double(), images, BOUNDARY)
    assert difference.abs().max() < 1e-5


def test_the_lattice_is_near():
    probs, images = smooth_case(1, 5, 32)
    exact_KHW = mean_field(probs, images, BOUNDARY)[0].numpy()
    lattice_KHW = dense_crf(probs[0].numpy(), images[0].numpy(), BOUNDARY)
    assert np.abs(exact_KHW - lattice_KHW).mean() < 0.02
    assert (exact_KHW.argmax(0) == lattice_KHW.argmax(0)).mean() > 0.95


def test_products_in_bf16_are_near():
    probs, images = smooth_case(2, 21, 24)
    exact, near = (mean_field(probs, images, BOUNDARY, products) for products in (torch.float32, torch.bfloat16))
    assert near.dtype == torch.float32 and (near - exact).abs().max() < 0.02
    assert (near.argmax(1) == exact.argmax(1)).float().mean() > 0.995


def test_images_of_a_batch_do_not_depend_on_each_other():
    probs, images = smooth_case(3, 4, 8)
    together = mean_field(probs, images, BOUNDARY)
    torch.testing.assert_close(torch.cat([mean_field(probs[n : n + 1], images[n : n + 1], BOUNDARY) for n in range(3)]), together)
    assert together.sum(1).sub(1).abs().max() < 1e-5 and together.shape == probs.shape
