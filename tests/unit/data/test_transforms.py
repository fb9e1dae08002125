"""Augmentation: the published crops of image and seed, drawn only from the generator, and photometric distortion in HSV."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from weakclip.config import AugmentConfig
from weakclip.data import transforms
from weakclip.data.codecs import decode_jpeg
from weakclip.data.photometric import IMAGENET, NORMALISATIONS, distort
from weakclip.data.plan import generator
from weakclip.data.transforms import draw_crop, draw_photometric, resize_image, resize_window, scaled_size
from weakclip.models.architectures import open_clip


def coordinates(H: int, W: int) -> tuple[np.ndarray, np.ndarray]:
    """An image whose red and green are a pixel's x and y, and a seed that follows from them."""
    y_HW, x_HW = np.mgrid[:H, :W].astype(np.uint8)
    return np.stack([x_HW, y_HW, np.full_like(x_HW, 77)], axis=2), seed_of(x_HW, y_HW)


def seed_of(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x // 16 % 4 + 4 * (y // 16 % 4)).astype(np.uint8)


def config(**changes) -> AugmentConfig:
    return AugmentConfig(**({"crop": 48, "ratio": [1.0, 1.0], "max_class_share": 1.0, "photometric": False} | changes))


def augment(image_HW3: np.ndarray, seed_HW: np.ndarray, rng: np.random.Generator, config: AugmentConfig, scale):
    return transforms.augment(lambda least: image_HW3, seed_HW, (), rng, config, scale)


def published(image_HW3: np.ndarray, seed_HW: np.ndarray, rng: np.random.Generator, config: AugmentConfig, scale):
    """The order of work of mmseg's transforms: the whole image is resized, then cropped, flipped and padded."""
    size = scaled_size(*seed_HW.shape, scale, rng.uniform(*config.ratio))
    image_HW3 = resize_image(image_HW3, size)
    seed_HW = cv2.resize(seed_HW, size[::-1], interpolation=cv2.INTER_NEAREST)
    for _ in range(10):
        top, left = (rng.integers(max(side - config.crop, 0) + 1) for side in size)
        window = slice(top, top + config.crop), slice(left, left + config.crop)
        counts = np.bincount(seed_HW[window].ravel(), minlength=256)[:255]
        if (counts > 0).sum() > 1 and counts.max() < config.max_class_share * counts.sum():
            break
    image_HW3, seed_HW = image_HW3[window], seed_HW[window]
    if rng.random() < config.flip:
        image_HW3, seed_HW = image_HW3[:, ::-1], seed_HW[:, ::-1]
    bottom, right = config.crop - seed_HW.shape[0], config.crop - seed_HW.shape[1]
    image_HW3 = np.pad(image_HW3, ((0, bottom), (0, right), (0, 0)))
    return image_HW3, np.pad(seed_HW, ((0, bottom), (0, right)), constant_values=255)


# ------------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    "H, W, factor, size",
    [
        (375, 500, 1.0, (512, 683)),  # the short side decides: 512 / 375 * 500 = 682.67
        (375, 500, 0.5, (256, 341)),  # 256 / 375 * 500 = 341.33
        (500, 375, 1.5, (1024, 768)),  # int(1.5 * 512) / 375 = 2.048
        (300, 2000, 1.0, (307, 2048)),  # the long side decides
        (512, 2048, 0.75, (384, 1536)),
        (100, 100, 0.333, (170, 170)),  # sides of the scale are cut to integers first: int(170.496)
        (1, 4000, 0.5, (1, 1024)),
        (1, 1, 1.0, (512, 512)),
    ],
)
def test_scaled_sizes_follow_mmcvs_rule(H, W, factor, size):
    assert scaled_size(H, W, (2048, 512), factor) == size


@pytest.mark.parametrize("number", range(8))
def test_without_a_resize_every_pixel_keeps_its_seed(number):
    image_HW3, seed_HW = augment(*coordinates(96, 64), generator(number), config(), (96, 64))[:2]
    assert image_HW3.shape == (48, 48, 3) and image_HW3.dtype == seed_HW.dtype == np.uint8
    np.testing.assert_array_equal(seed_HW, seed_of(image_HW3[..., 0], image_HW3[..., 1]))


@pytest.mark.parametrize("number", range(8))
def test_with_a_resize_image_and_seed_stay_together(number):
    image_HW3, seed_HW = augment(*coordinates(96, 64), generator(number), config(ratio=[0.7, 2.0]), (96, 64))[:2]
    inside_HW = seed_HW != 255
    matches = (seed_HW == seed_of(image_HW3[..., 0], image_HW3[..., 1]))[inside_HW]
    assert matches.mean() > 0.85  # borders of the blocks differ, bilinear against nearest


def test_crops_and_flips_move_over_the_whole_image():
    left, top, flipped = set(), set(), []
    for number in range(150):
        image_HW3 = augment(*coordinates(60, 60), generator(number), config(), (60, 60))[0].astype(int)
        flipped.append(image_HW3[0, 0, 0] > image_HW3[0, -1, 0])
        left.add(image_HW3[..., 0].min())
        top.add(image_HW3[..., 1].min())
    assert left == top == set(range(13))
    assert 45 < sum(flipped) < 105


@pytest.mark.parametrize("flip, flipped", [(0.0, False), (1.0, True)])
def test_flip_is_a_probability(flip, flipped):
    for number in range(10):
        image_HW3 = augment(*coordinates(48, 48), generator(number), config(flip=flip), (48, 48))[0]
        assert (image_HW3[0, 0, 0] > image_HW3[0, -1, 0]) == flipped


def test_small_images_are_padded_with_black_and_ignored_at_the_bottom_and_right():
    image_HW3, seed_HW, _ = augment(*coordinates(20, 30), generator(1), config(flip=0.0), (30, 20))
    assert not image_HW3[20:].any() and not image_HW3[:, 30:].any()
    assert (seed_HW[20:] == 255).all() and (seed_HW[:, 30:] == 255).all()
    np.testing.assert_array_equal(seed_HW[:20, :30], coordinates(20, 30)[1])


def test_the_same_generator_gives_the_same_sample_and_another_one_another():
    first, again, other = (augment(*coordinates(96, 64), generator(n), AugmentConfig(crop=48), (96, 64)) for n in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_photometric_can_be_off():
    draws = [augment(*coordinates(48, 48), generator(3), config(photometric=on), (48, 48))[2] for on in (False, True)]
    assert not draws[0].any() and draws[1].any() and draws[0].dtype == draws[1].dtype == np.float32


def crop_share(number: int, seed_HW: np.ndarray, share: float) -> float:
    """What the largest class covers of the seeded pixels in one crop."""
    image_HW3 = np.zeros((*seed_HW.shape, 3), np.uint8)
    crop_HW = augment(image_HW3, seed_HW, generator(number), config(max_class_share=share), seed_HW.shape[::-1])[1]
    counts = np.bincount(crop_HW.ravel(), minlength=256)[:255]
    return counts.max() / counts.sum()


def test_a_crop_of_mostly_one_class_is_drawn_again():
    seed_HW = np.zeros((48, 640), np.uint8)
    seed_HW[:, 560:] = 1  # 5 % of the windows have both classes at 25 % or more
    shares = [crop_share(number, seed_HW, 0.75) for number in range(150)]
    good = sum(share < 0.75 for share in shares)
    assert 0.2 < good / 150 < 0.55  # 1 - 0.96 ** 10 = 0.34; a single draw would give 6 of 150, no limit all of them


def test_ignored_pixels_do_not_count_in_a_crops_shares():
    seed_HW = np.full((48, 640), 255, np.uint8)
    seed_HW[:, ::4], seed_HW[:, 1::4] = 0, 1  # each is half of the seeded pixels
    first = [
        augment(np.zeros((48, 640, 3), np.uint8), seed_HW, generator(7), config(max_class_share=s), (640, 48))[1]
        for s in (0.6, 1)
    ]
    assert np.array_equal(*first)  # accepted at the first draw either way


@pytest.mark.parametrize("value", [0, 5, 255])
def test_a_seed_of_one_value_ends_after_ten_draws(value):
    seed_HW = augment(np.zeros((64, 64, 3), np.uint8), np.full((64, 64), value, np.uint8), generator(0), config(), (64, 64))[1]
    assert (seed_HW == value).all()


@settings(max_examples=200, deadline=None)
@example(H=1, W=3, number=0, values=(0, 7, 255), crop=5, share=0.75, likely=())
@given(
    H=st.integers(1, 90), W=st.integers(1, 90), number=st.integers(0, 10**6), values=st.sampled_from([(0,), (0, 7), (0, 7, 255)]),
    crop=st.integers(1, 70), share=st.sampled_from([0.3, 0.75, 1.0]), likely=st.sampled_from([(), (7,), (3, 7)]),
)  # fmt: skip
def test_crops_are_those_of_the_published_order_of_work(H, W, number, values, crop, share, likely):
    rng = generator(number)
    image_HW3 = rng.integers(0, 256, (H, W, 3), np.uint8)
    seed_HW = cv2.resize(rng.choice(np.array(values, np.uint8), (5, 5)), (W, H), interpolation=cv2.INTER_NEAREST)
    options = AugmentConfig(crop=crop, max_class_share=share, ratio=[0.3, 2.5])
    want_image, want_seed = published(image_HW3, seed_HW, generator(number), options, (120, 60))
    image, seed, _ = transforms.augment(lambda least: image_HW3, seed_HW, likely, generator(number), options, (120, 60))
    np.testing.assert_array_equal(seed, want_seed)
    # Noise is the worst case: a neighbour may differ by 255, of which 1/64 is 4, along both axes, and values are rounded.
    assert np.abs(image.astype(int) - want_image).max() <= 9


def test_real_crops_differ_from_the_published_ones_by_a_grey_level_in_places(coco_mini):
    differences = []
    for number, path in enumerate(sorted((coco_mini / "train2014").iterdir())[:20]):
        image_HW3 = np.array(Image.open(path).convert("RGB"))
        seed_HW = np.zeros(image_HW3.shape[:2], np.uint8)
        image, _ = augment(image_HW3, seed_HW, generator(number), AugmentConfig(), (2048, 512))[:2]
        want, _ = published(image_HW3, seed_HW, generator(number), AugmentConfig(), (2048, 512))
        differences.append(np.abs(image.astype(int) - want))
    assert np.mean(differences) < 0.1 and np.max(differences) <= 9


def test_a_window_of_everything_is_resized_exactly():
    image_HW3 = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    found = resize_window(image_HW3, (37, 53), (61, 40), (slice(0, 61), slice(0, 40)))
    np.testing.assert_array_equal(found, resize_image(image_HW3, (61, 40)))


@pytest.mark.parametrize("H, W", [(1000, 1403), (1405, 997), (640, 1280)])
@pytest.mark.parametrize("factor", [0.07, 0.11, 0.2, 0.3, 0.45])
def test_an_image_that_was_decoded_reduced_keeps_its_place(H, W, factor):
    """Soft spots at 1/2, 3/8, 1/4 or 1/8 of their size, against the same resized whole."""
    noise_hw3 = np.random.default_rng(0).normal(size=(int(H * factor / 4), int(W * factor / 4), 3)).astype(np.float32)
    spots_HW3 = cv2.resize(noise_hw3, (W, H), interpolation=cv2.INTER_CUBIC)
    spots_HW3 = cv2.normalize(spots_HW3, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(spots_HW3).save(buffer, "JPEG", quality=98, subsampling=0)
    options = AugmentConfig(crop=64, ratio=[factor, factor])
    for number in range(5):
        crop, _ = draw_crop(np.zeros((H, W), np.uint8), (), generator(number), options, (max(H, W), min(H, W)))
        reduced_HW3 = decode_jpeg(buffer.getvalue(), (H, W), crop.size)
        assert max(reduced_HW3.shape) <= max(H, W) / 2 + 1
        found, want = (crop.of_image(image, (H, W)).astype(int) for image in (reduced_HW3, spots_HW3))
        aligned = np.abs(found - want).mean()
        assert all(aligned < 0.25 * np.abs(found - np.roll(want, 1, axis)).mean() for axis in (0, 1))


# --------------------------------------------------------------------------------------------------------------- colours


def test_normalisation_uses_imagenets_mean_and_deviation():
    x_B3HW = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1) + torch.tensor([58.395, -57.12, 2 * 57.375]).view(
        1, 3, 1, 1
    )
    torch.testing.assert_close(IMAGENET.apply(x_B3HW).flatten(), torch.tensor([1.0, -1.0, 2.0]))
    zeros_B3HW = torch.zeros(1, 3, 1, 1)
    assert IMAGENET.apply(zeros_B3HW).flatten().tolist() == pytest.approx([-2.117904, -2.035714, -1.804444], abs=1e-5)


def test_clips_own_normalisation_is_open_clips():
    clip = NORMALISATIONS["clip"]
    assert [value / 255 for value in clip.mean] == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    assert [value / 255 for value in clip.std] == pytest.approx(open_clip.OPENAI_DATASET_STD)
    x_B3HW = torch.rand(2, 3, 4, 4) * 255
    torch.testing.assert_close(clip.undo(clip.apply(x_B3HW)), x_B3HW)


def reference(rgb_HW3: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Brightness, contrast, saturation, hue with OpenCV's HSV, in 0..255 and without rounding in between."""
    brightness, contrast, saturation, hue, last = draws.tolist()
    rgb_HW3 = np.clip(rgb_HW3.astype(np.float32) + brightness, 0, 255)
    if contrast and not last:
        rgb_HW3 = np.clip(rgb_HW3 * contrast, 0, 255)
    hsv_HW3 = cv2.cvtColor(rgb_HW3.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
    hsv_HW3[..., 1] = np.clip(hsv_HW3[..., 1] * (saturation or 1), 0, 1)
    hsv_HW3[..., 0] = (hsv_HW3[..., 0] + hue) % 360
    rgb_HW3 = cv2.cvtColor(hsv_HW3, cv2.COLOR_HSV2RGB) * 255
    return np.clip(rgb_HW3 * contrast, 0, 255) if contrast and last else rgb_HW3


def distorted(rgb_BHW3: np.ndarray, draws_B5: np.ndarray) -> np.ndarray:
    x_B3HW = distort(torch.from_numpy(rgb_BHW3).permute(0, 3, 1, 2), torch.from_numpy(draws_B5))
    return x_B3HW.permute(0, 2, 3, 1).numpy()


DRAWS = np.array(
    [
        [0, 0, 0, 0, 0],
        [32, 0, 0, 0, 0],
        [-32, 1.5, 0, 0, 0],
        [-20, 0.5, 0, 0, 1],
        [0, 0, 1.5, 0, 0],
        [0, 0, 0.5, 0, 1],
        [0, 0, 0, 34, 0],
        [0, 0, 0, -36, 0],
        [30, 1.4, 1.3, 20, 0],
        [30, 1.4, 1.3, 20, 1],
        [-30, 0.6, 0.7, -14, 1],
    ],
    np.float32,
)


@pytest.mark.parametrize("draws", DRAWS, ids=str)
def test_distortion_equals_opencvs_hsv(draws):
    rgb_HW3 = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    grey_HW3 = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    for pixels_HW3 in (rgb_HW3, grey_HW3, np.zeros_like(grey_HW3), np.full_like(grey_HW3, 255)):
        found = distorted(pixels_HW3[None], draws[None])[0]
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, reference(pixels_HW3, draws), atol=0.02)


def test_each_image_of_a_batch_is_distorted_by_its_own_draws():
    rgb_HW3 = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    together = distorted(np.stack([rgb_HW3] * len(DRAWS)), DRAWS)
    for draws, found in zip(DRAWS, together, strict=True):
        np.testing.assert_allclose(found, distorted(rgb_HW3[None], draws[None])[0], atol=1e-3)


def test_draws_lie_in_their_published_ranges_and_are_used_half_of_the_time():
    draws_n5 = np.stack([draw_photometric(generator(n)) for n in range(400)])
    brightness, contrast, saturation, hue, last = draws_n5.T
    for values, low, high in [(brightness, -32, 32), (contrast, 0.5, 1.5), (saturation, 0.5, 1.5), (hue, -36, 34)]:
        used = values[values != 0]
        assert low <= used.min() < low + 0.1 * (high - low) and high - 0.1 * (high - low) < used.max() <= high
        assert 140 < len(used) < 260
    assert set(last) == {0, 1} and (hue % 2 == 0).all()
