"""Sliding windows, multi-scale and flip."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weakclip.config import InferenceConfig
from weakclip.data.photometric import IMAGENET
from weakclip.masks.sliding_window import Predictor, predict, slide, starts
from weakclip.runtime import compilation

SCALE = (128, 64)


def settings(**changes) -> InferenceConfig:
    return InferenceConfig(**({"scales": [1.0], "flip": False, "window": 64, "stride": 42} | changes))


def picture(H: int, W: int) -> np.ndarray:
    return np.random.default_rng(H * 1000 + W).integers(0, 256, (H, W, 3), np.uint8)


class MeanOfWindow:
    """Logits that are everywhere the mean of the window's first channel (class 0) and the number of images (class 1)."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def predictor(self) -> Predictor:
        return Predictor(self, 2, IMAGENET, 32, torch.device("cpu"))

    def __call__(self, x_B3HW: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(x_B3HW.shape))
        B, _, H, W = x_B3HW.shape
        means_B = x_B3HW[:, 0].mean((1, 2))
        return torch.stack([means_B, torch.full((B,), float(B))], dim=1)[:, :, None, None].expand(B, 2, H // 4, W // 4)


# ------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    "length, window, stride, want",
    [
        (512, 512, 341, [0]),
        (100, 512, 341, [0]),
        (513, 512, 341, [0, 1]),
        (683, 512, 341, [0, 171]),
        (853, 512, 341, [0, 341]),
        (854, 512, 341, [0, 341, 342]),
        (1024, 512, 341, [0, 341, 512]),
        (10, 4, 4, [0, 4, 6]),
    ],
)
def test_windows_begin_every_stride_and_the_last_ends_with_the_image(length, window, stride, want):
    assert starts(length, window, stride) == want


@given(st.integers(1, 300), st.integers(1, 60), st.data())
def test_windows_cover_every_pixel_without_one_too_many(length, window, data):
    stride = data.draw(st.integers(1, window))
    found = starts(length, window, stride)
    covered = {pixel for start in found for pixel in range(start, min(start + window, length))}
    assert covered == set(range(length)) and sorted(set(found)) == found
    assert all(start + window <= max(length, window) for start in found)


def test_overlapping_windows_are_averaged():
    x_3HW = torch.zeros(3, 32, 80)
    x_3HW[0] = torch.arange(80) // 8
    logits_2HW = slide(MeanOfWindow().predictor(), x_3HW, settings(window=32, stride=24, window_batch=2))
    # Windows at 0, 24 and 48 with means 1.5, 4.5, 7.5; the fourth and the seventh group of columns are in two of them.
    assert logits_2HW[0, 0, ::8].tolist() == pytest.approx([1.5, 1.5, 1.5, 3.0, 4.5, 4.5, 6.0, 7.5, 7.5, 7.5])
    assert logits_2HW[1, 0, ::8].tolist() == pytest.approx([2, 2, 2, 2, 2, 2, 1.5, 1, 1, 1])  # batches of two and of one


def test_an_image_smaller_than_the_window_is_one_forward_of_itself(tiny_model):
    model = tiny_model()
    x_3HW = torch.randn(3, 48, 64)
    with torch.no_grad():
        want_KHW = torch.nn.functional.interpolate(model(x_3HW[None]).logits_BKhw, size=(48, 64), mode="bilinear")[0]
        torch.testing.assert_close(slide(model.predictor(), x_3HW, settings()), want_KHW)


def test_windows_in_one_batch_give_what_they_give_one_by_one(tiny_model):
    predictor, x_3HW = tiny_model().predictor(), torch.randn(3, 100, 90)
    with torch.no_grad():
        one, four = (slide(predictor, x_3HW, settings(window_batch=n)) for n in (1, 4))
    torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-5)


def test_full_windows_are_compiled_in_batches_of_one_size_and_the_others_are_not(tiny_model, monkeypatch):
    predictor, inside, seen = tiny_model().predictor(), [], []

    @contextmanager
    def in_turn(one_shape):
        inside.append(one_shape)
        yield
        inside.clear()

    def logits(x_B3HW):
        seen.append((tuple(x_B3HW.shape), inside == [True]))
        return predictor.logits(x_B3HW)

    monkeypatch.setattr(compilation, "in_turn", in_turn)
    config = settings(scales=[0.5, 1.0, 1.5], window_batch=4)
    eager, compiled = (
        predict(predictor._replace(logits=logits, compiled=way), picture(64, 100), config, SCALE) for way in (False, True)
    )
    assert seen[:4] == [((n, 3, *side), False) for n, side in [(1, (32, 50)), (4, (64, 64)), (4, (64, 64)), (2, (64, 64))]]
    assert seen[4:] == [((1, 3, 32, 50), False)] + [((4, 3, 64, 64), True)] * 2 + [((2, 3, 64, 64), False)]
    torch.testing.assert_close(compiled, eager)


def test_a_window_too_small_for_the_pyramid_is_padded_for_the_model_alone():
    model = MeanOfWindow()
    assert slide(model.predictor(), torch.randn(3, 5, 70), settings(window=512)).shape == (2, 5, 70)
    assert model.shapes == [(1, 3, 32, 70)]


# --------------------------------------------------------------------------------------------------------- whole images


def test_probabilities_are_averaged_over_scales_and_mirror_images():
    image_HW3, model = picture(32, 48), MeanOfWindow()
    with_all = predict(model.predictor(), image_HW3, settings(scales=[0.5, 1.0], flip=True, window=512, window_batch=1), SCALE)
    assert [shape[2:] for shape in model.shapes] == [(32, 48), (32, 48), (64, 96), (64, 96)]
    parts = [predict(model.predictor(), image_HW3, settings(scales=[s], window=512), SCALE) for s in (0.5, 1.0)]
    torch.testing.assert_close(with_all, sum(parts) / 2)  # the mean does not change with a flip


def test_one_pass_is_the_softmax_of_logits_at_the_images_size():
    image_HW3 = picture(64, 64)
    probs_2HW = predict(MeanOfWindow().predictor(), image_HW3, settings(), SCALE)
    mean = IMAGENET.apply(torch.from_numpy(image_HW3).permute(2, 0, 1).float())[0].mean()
    want_2 = torch.stack([mean, torch.tensor(1.0)]).softmax(0)
    torch.testing.assert_close(probs_2HW, want_2[:, None, None].expand(2, 64, 64))


@pytest.mark.parametrize("H, W", [(1, 1), (1, 70), (90, 2), (40, 33), (64, 64)])
def test_images_of_any_size_give_finite_probabilities_that_sum_to_one(tiny_model, H, W):
    probs_KHW = predict(tiny_model().predictor(), picture(H, W), settings(scales=[0.5, 1.25], flip=True), SCALE)
    assert probs_KHW.shape == (4, H, W) and probs_KHW.dtype == torch.float32
    assert probs_KHW.isfinite().all() and (probs_KHW >= 0).all()
    torch.testing.assert_close(probs_KHW.sum(0), torch.ones(H, W))


def test_the_mirrored_image_gives_the_mirrored_probabilities(tiny_model):
    predictor, image_HW3 = tiny_model().predictor(), picture(48, 75)
    straight, flipped = (predict(predictor, i, settings(flip=True), SCALE) for i in (image_HW3, image_HW3[:, ::-1].copy()))
    torch.testing.assert_close(flipped.flip(2), straight, rtol=1e-3, atol=1e-4)
    alone = predict(predictor, image_HW3, settings(), SCALE)
    assert not alone.allclose(straight, atol=1e-4)


def test_the_text_tower_runs_once_for_all_images(tiny_model, monkeypatch):
    model = tiny_model()
    predictor = model.predictor()
    want = predict(predictor, picture(48, 64), settings(), SCALE)
    monkeypatch.setattr(type(model), "encode_names", lambda self: pytest.fail("the text tower ran"))
    torch.testing.assert_close(predict(predictor, picture(48, 64), settings(), SCALE), want)
