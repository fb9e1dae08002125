"""Upsampling windows' logits to probabilities at the image's size, against a plain implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from weakclip.config import InferenceConfig
from weakclip.data.photometric import IMAGENET
from weakclip.data.transforms import resize_image
from weakclip.masks import sliding_window
from weakclip.masks.sliding_window import Predictor, predict, predict_in_strips, scaled_sizes, starts
from weakclip.masks.upsampling import WHOLE, joined

SCALE = (256, 96)


def settings(**changes) -> InferenceConfig:
    return InferenceConfig(**({"scales": [0.5, 1.0, 1.6], "flip": True, "window": 64, "stride": 40} | changes))


def network(sharpness: float, classes: int = 12, smooth: int = 8) -> Predictor:
    """Logits are linear in smoothed colours."""
    weights_K3 = torch.randn(classes, 3, generator=torch.Generator().manual_seed(5))

    def logits(x_B3HW: torch.Tensor) -> torch.Tensor:
        pooled_B3hw = F.avg_pool2d(F.avg_pool2d(x_B3HW, smooth, 1, smooth // 2), 4)
        return sharpness * torch.einsum("kc,bchw->bkhw", weights_K3, pooled_B3hw)

    return Predictor(logits, classes, IMAGENET, 32, torch.device("cpu"))


def picture(H: int, W: int, coarse: int = 16) -> np.ndarray:
    """Blurred patches of colour."""
    small = np.random.default_rng(H * 1000 + W).integers(0, 256, (H // coarse + 2, W // coarse + 2, 3), np.uint8)
    return resize_image(small, (H, W))


def plainly(predictor: Predictor, image_HW3: np.ndarray, config: InferenceConfig) -> torch.Tensor:
    """The released code's order of work: each window resized and added, then all classes at the image's size."""
    total, count = torch.zeros(()), 0
    for h, w in scaled_sizes(image_HW3, config, SCALE):
        x_3HW = IMAGENET.apply(torch.from_numpy(resize_image(image_HW3, (h, w))).permute(2, 0, 1).float())
        for flipped in (False, True) if config.flip else (False,):
            seen_3HW = x_3HW.flip(2) if flipped else x_3HW
            sum_KHW, count_HW = torch.zeros(predictor.num_classes, h, w), torch.zeros(h, w)
            for y in starts(h, config.window, config.stride):
                for x in starts(w, config.window, config.stride):
                    window = seen_3HW[None, :, y : y + config.window, x : x + config.window]
                    rows, columns = window.shape[2:]
                    padded = F.pad(window, (0, max(0, 32 - columns), 0, max(0, 32 - rows)))
                    logits = F.interpolate(predictor.logits(padded), size=padded.shape[2:], mode="bilinear")
                    sum_KHW[:, y : y + rows, x : x + columns] += logits[0, :, :rows, :columns]
                    count_HW[y : y + rows, x : x + columns] += 1
            logits = F.interpolate((sum_KHW / count_HW)[None], size=image_HW3.shape[:2], mode="bilinear")
            probs = logits.softmax(1)[0]
            total, count = total + (probs.flip(2) if flipped else probs), count + 1
    return total / count


@pytest.mark.parametrize("sharpness", [0.1, 1, 8, 60])
@pytest.mark.parametrize("H, W, smooth", [(150, 200, 8), (97, 131, 2), (20, 300, 8), (1, 1, 2), (64, 64, 4)])
def test_probabilities_are_those_of_the_plain_order(H, W, smooth, sharpness):
    predictor, image_HW3 = network(sharpness, smooth=smooth), picture(H, W)
    probs_KHW, want_KHW = predict(predictor, image_HW3, settings(), SCALE), plainly(predictor, image_HW3, settings())
    assert (probs_KHW - want_KHW).abs().max() <= 2e-6 * max(sharpness, 1)
    torch.testing.assert_close(probs_KHW.sum(0), torch.ones(H, W), rtol=0, atol=1e-5)
    assert (probs_KHW.argmax(0) == want_KHW.argmax(0)).float().mean() >= 0.999


def test_one_tile_as_on_a_gpu_gives_the_same(monkeypatch):
    predictor, image_HW3 = network(8), picture(97, 131)
    monkeypatch.setattr(sliding_window, "TILE", WHOLE)
    probs_KHW = predict(predictor, image_HW3, settings(), SCALE)
    torch.testing.assert_close(probs_KHW, plainly(predictor, image_HW3, settings()), rtol=0, atol=2e-5)


def test_neighbouring_cells_that_are_sure_of_different_classes_give_finite_probabilities():
    """Between them each class' mean is far below the best of either, and their exponentials vanish."""

    def checks(x_B3HW: torch.Tensor) -> torch.Tensor:
        B, _, H, W = x_B3HW.shape
        odd_hw = (torch.arange(H // 4)[:, None] + torch.arange(W // 4)) % 2
        return 1000 * torch.stack([odd_hw, 1 - odd_hw, odd_hw * 0 + 0.4]).float().expand(B, 3, -1, -1)

    predictor = Predictor(checks, 3, IMAGENET, 32, torch.device("cpu"))
    image_HW3 = picture(100, 140)
    probs_KHW = predict(predictor, image_HW3, settings(scales=[1.0]), SCALE)
    want_KHW = plainly(predictor, image_HW3, settings(scales=[1.0]))
    torch.testing.assert_close(probs_KHW, want_KHW, rtol=0, atol=1e-3)
    torch.testing.assert_close(probs_KHW.sum(0), torch.ones(100, 140), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(bad):
    def broken(x_B3HW: torch.Tensor) -> torch.Tensor:
        logits_BKhw = network(8).logits(x_B3HW)
        logits_BKhw[:, 3, 2, 2] = bad
        return logits_BKhw

    predictor = Predictor(broken, 12, IMAGENET, 32, torch.device("cpu"))
    assert predict(predictor, picture(100, 140), settings(), SCALE).isnan().any()


def test_strips_are_parts_of_the_whole_as_often_as_they_are_wanted():
    predictor, image_HW3 = network(8), picture(150, 200)
    whole_KHW = predict(predictor, image_HW3, settings(), SCALE)
    strips = predict_in_strips(predictor, image_HW3, settings(), SCALE)
    for _ in range(2):
        rows = [*strips()]
        assert len(rows) > 1 and joined(rows).equal(whole_KHW)
