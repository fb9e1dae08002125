"""Bilinear resizing against F.interpolate: the same values and gradients, for the sizes of training and for odd ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from weakclip.models.resize import by_matrices, doubled, resize

SIZES = [
    ((32, 32), (512, 512)), ((128, 128), (64, 64)), ((16, 16), (128, 128)), ((32, 32), (128, 128)), ((8, 8), (16, 16)),
    ((7, 5), (13, 29)), ((13, 29), (7, 5)), ((1, 3), (4, 1)), ((24, 36), (15, 21)), ((37, 37), (73, 73)),
]  # fmt: skip


def assert_same(function, size, align_corners, before, dtype, tolerance):
    """`function` and F.interpolate in float64 differ by less than `tolerance` of the largest value, and so do their gradients."""

    def plain(x_BCHW):
        return F.interpolate(x_BCHW, size=size, mode="bilinear", align_corners=align_corners)

    maps = torch.randn(2, 3, *before, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.linspace(-1, 1, 6 * size[0] * size[1], dtype=torch.float64).view(2, 3, *size)
    results = []
    for resized, kind in ((function, dtype), (plain, torch.float64)):
        x_BCHW = maps.to(kind).requires_grad_()
        y_BCHW = resized(x_BCHW)
        (y_BCHW * weights.to(kind)).sum().backward()
        results.append((y_BCHW.detach(), x_BCHW.grad))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_bf16_is_rounded_once_and_autocast_leaves_fp32_alone():
    maps = torch.randn(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            torch.equal(resize(maps, (30, 31), True), resize(maps.clone(), (30, 31), True))
            and resize(maps, (30, 31)).dtype == maps.dtype
        )
        rounded = resize(maps.bfloat16(), (30, 31), align_corners=True)
    exact = F.interpolate(maps.bfloat16().double(), size=(30, 31), mode="bilinear", align_corners=True)
    torch.testing.assert_close(rounded.double(), exact, rtol=2**-8, atol=1e-6)


DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str)


@DTYPES
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_matrix_products_are_the_bilinear_resize(before, after, align_corners, dtype, tolerance):
    assert_same(lambda x: by_matrices(x, after, align_corners), after, align_corners, before, dtype, tolerance)


@DTYPES
@pytest.mark.parametrize("before", [(8, 8), (64, 64), (5, 7), (1, 3)])
def test_shift_and_add_doubles_both_sides(before, dtype, tolerance):
    assert_same(doubled, tuple(2 * side for side in before), False, before, dtype, tolerance)


def test_the_same_size_is_left_alone():
    maps = torch.randn(1, 2, 5, 6)
    assert resize(maps, (5, 6)) is maps


def test_what_inference_kept_serves_training():
    with torch.inference_mode():
        resize(torch.randn(1, 2, 9, 11), (17, 23))
    maps = torch.randn(1, 2, 9, 11, requires_grad=True)
    resize(maps, (17, 23)).sum().backward()
    assert maps.grad is not None
