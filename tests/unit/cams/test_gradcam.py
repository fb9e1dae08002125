"""Maps of the frozen CLIP: the gradient's weights, the attention, and the affinity computed from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from weakclip.cams import gradcam
from weakclip.config import CamConfig, ClipConfig
from weakclip.models.clip import FrozenClip

SCALE = [128, 64]


@pytest.fixture(scope="module")
def clip(tiny_clip) -> FrozenClip:
    return FrozenClip(ClipConfig(model=None, pretrained=str(tiny_clip), image_size=64, double_class_embedding=False), 0)


@pytest.fixture(scope="module")
def texts_CE() -> torch.Tensor:
    return F.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(1)), dim=1)


@pytest.fixture(scope="module")
def image_HW3() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (64, 96, 3), np.uint8)


@pytest.fixture(scope="module")
def image_13HW() -> torch.Tensor:
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("options", [{}, {"scales": [0.5, 1.5]}, {"flip": True}, {"affinity_steps": 0}, {"attention_blocks": 2}])
def test_maps_have_the_size_that_is_asked_for_and_reach_one(clip, texts_CE, image_HW3, options):
    maps_nhw = gradcam.activation_maps(clip, image_HW3[:50, :70], texts_CE, 2, CamConfig(**options), SCALE, (13, 18))
    assert maps_nhw.shape == (2, 13, 18) and maps_nhw.dtype == np.float32
    assert maps_nhw.min((1, 2)).tolist() == [0, 0] and maps_nhw.max((1, 2)) == pytest.approx([1, 1])
    assert not np.array_equal(maps_nhw[0], maps_nhw[1])


def test_the_same_image_gives_the_same_maps(clip, texts_CE, image_HW3):
    first, second = (gradcam.activation_maps(clip, image_HW3, texts_CE, 2, CamConfig(), SCALE, (16, 24)) for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("steps", [0, 2])
def test_a_flipped_image_gives_flipped_maps(clip, texts_CE, image_HW3, steps):
    both = CamConfig(flip=True, affinity_steps=steps)
    flipped_HW3 = np.ascontiguousarray(image_HW3[:, ::-1])
    maps_nhw, flipped_nhw = (
        gradcam.activation_maps(clip, image, texts_CE, 2, both, SCALE, (16, 24)) for image in (image_HW3, flipped_HW3)
    )
    np.testing.assert_allclose(flipped_nhw, maps_nhw[:, :, ::-1], atol=1e-4)
    assert np.abs(flipped_nhw - maps_nhw).max() > 1e-3


def test_maps_are_weighed_by_the_gradient_that_open_clips_tower_gives(clip, texts_CE, image_13HW, make_tiny_clip):
    other, seen = make_tiny_clip(), {}
    last = other.visual.transformer.resblocks[-1]
    last.ln_1.register_forward_hook(lambda module, given, output: seen.update(normed=output))
    last.register_forward_hook(lambda module, given, output: seen.update(end=output))
    other.visual(image_13HW)
    image_E = F.normalize(other.visual.ln_post(seen["end"])[0, 1:].mean(0) @ other.visual.proj, dim=0)
    probabilities_C = (other.logit_scale.exp() * texts_CE @ image_E).softmax(0)
    expected = []
    for i in range(3):
        (gradient_1TD,) = torch.autograd.grad(probabilities_C[i], seen["normed"], retain_graph=True)
        channels_D = gradient_1TD[0, 1:].mean(0)
        expected.append((seen["normed"][0, 1:] * channels_D).sum(1).clamp(min=0))
    before = gradcam.before_last_block(clip.vision, image_13HW, 1)
    found_nL = gradcam.softmax_gradcam(clip, before, texts_CE, 3)
    expected_nL = torch.stack(expected).detach()
    assert (expected_nL > 0).any(1).all()
    torch.testing.assert_close(found_nL, expected_nL, rtol=1e-3, atol=1e-5 * float(expected_nL.max()))


def test_the_tokens_before_the_last_block_become_the_towers_own(clip):
    images_13HW = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(4))
    before = gradcam.before_last_block(clip.vision, images_13HW, 99)
    assert before.attention_LL.shape == (24, 24)
    end_1TD = clip.vision.blocks[-1](before.tokens_1TD)
    torch.testing.assert_close(end_1TD[:, 1:].mT.unflatten(2, (4, 6)), clip.vision(images_13HW).taps[-1])


def test_attention_is_the_modules_own(clip, image_13HW):
    block, x_1TD = clip.vision.blocks[1], clip.vision.embed(image_13HW)
    normed_1TD = block.ln_1(x_1TD)
    own_1TT = block.attn(normed_1TD, normed_1TD, normed_1TD, need_weights=True)[1]
    torch.testing.assert_close(gradcam.attention(block, x_1TD, None), own_1TT[0])


def test_attention_is_averaged_over_the_last_blocks(clip, image_13HW):
    x_1TD, single = clip.vision.embed(image_13HW), []
    for block in clip.vision.blocks:
        single.append(gradcam.attention(block, x_1TD, None)[1:, 1:])
        x_1TD = block(x_1TD)
    for count, blocks in ((1, single[-1:]), (3, single[-3:]), (8, single)):
        before = gradcam.before_last_block(clip.vision, image_13HW, count)
        torch.testing.assert_close(before.attention_LL, torch.stack(blocks).mean(0))


def test_sinkhorn_makes_rows_and_columns_sum_to_one():
    attention_LL = torch.randn(40, 40, generator=torch.Generator().manual_seed(5)).mul(2).softmax(1)
    assert (attention_LL.sum(0) - 1).abs().max() > 0.1
    affinity_LL = gradcam.sinkhorn(attention_LL)
    for dim in (0, 1):
        torch.testing.assert_close(affinity_LL.sum(dim), torch.ones(40), rtol=0, atol=1e-3)


def test_boxes_enclose_each_part_that_is_strong():
    map_hw = torch.zeros(5, 6)
    map_hw[0, 0], map_hw[1, 1] = 1.0, 0.4  # components that touch at a corner are one
    map_hw[3, 4], map_hw[4, 4], map_hw[4, 5], map_hw[2, 0] = 0.5, 0.5, 0.9, 0.39
    expected_hw = torch.zeros(5, 6)
    expected_hw[0:2, 0:2] = expected_hw[3:5, 4:6] = 1
    nothing_hw = torch.zeros(5, 6)
    found_nL = gradcam.boxes(torch.stack([map_hw, nothing_hw]).flatten(1), (5, 6), 0.4)
    assert found_nL.equal(torch.stack([expected_hw, nothing_hw]).flatten(1))
    assert not gradcam.boxes(nothing_hw.flatten()[None], (5, 6), 0.0).any()


def test_patches_that_attend_to_themselves_keep_what_lies_in_the_boxes():
    maps_nL = torch.rand(2, 12, generator=torch.Generator().manual_seed(6))
    boxes_nL = torch.tensor([[1.0] * 5 + [0.0] * 7, [0.0] * 3 + [1.0] * 9])
    torch.testing.assert_close(gradcam.spread(maps_nL, boxes_nL, torch.eye(12), 3), maps_nL * boxes_nL)


def test_affinity_is_the_same_both_ways():
    attention_LL = torch.randn(12, 12, generator=torch.Generator().manual_seed(7)).mul(2).softmax(1)
    affinity_LL = gradcam.spread(torch.eye(12), torch.ones(12, 12), attention_LL, 1)
    torch.testing.assert_close(affinity_LL, affinity_LL.T)


def test_affinity_hands_on_along_the_attention():
    """Of a chain of patches each attends to itself and its neighbours: two steps reach two patches further."""
    chain_LL = torch.eye(7) + torch.diag(torch.ones(6), 1) + torch.diag(torch.ones(6), -1)
    start_1L, everywhere_1L = torch.eye(7)[3:4], torch.ones(1, 7)
    for steps in (0, 1, 2):
        reached = gradcam.spread(start_1L, everywhere_1L, chain_LL, steps)[0] > 0
        assert reached.nonzero().flatten().tolist() == list(range(3 - steps, 4 + steps))
    assert gradcam.spread(start_1L, everywhere_1L, chain_LL, 2).sum().item() == pytest.approx(1, abs=0.01)
