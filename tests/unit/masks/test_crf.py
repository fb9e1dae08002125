"""The dense CRF against the released code's, and `refine` with classes that do not occur."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from weakclip.config import CrfConfig
from weakclip.masks.crf import BOUNDARY, dense_crf, refine
from weakclip.recipe import load


@pytest.fixture(scope="module")
def released(golden) -> dict[str, np.ndarray]:
    return load_file(golden / "densecrf.safetensors")


def smooth_probs(K: int, H: int = 24, W: int = 20) -> np.ndarray:
    """Class k wins in the k-th vertical stripe."""
    stripe_W = np.arange(W) * K // W
    probs_KHW = np.full((K, H, W), 0.2 / K, np.float32)
    for k in range(K):
        probs_KHW[k][:, stripe_W == k] += 0.8
    return probs_KHW


IMAGE_HW3 = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)


@pytest.mark.parametrize("name", ["voc", "coco"])
@pytest.mark.parametrize("part", ["", "_subset"])
def test_full_size_inference_is_bit_equal_to_the_released_code(released, repo, name, part):
    crf = load(repo / f"configs/{name}.yaml").pseudo.crf
    marginals_KHW = dense_crf(released[f"probs{part}"], released["image_uint8"], crf)
    np.testing.assert_array_equal(marginals_KHW, released[f"{name}_q{part}"])


def test_the_boundary_losss_inference_is_bit_equal_to_the_released_code(released):
    marginals_KHW = dense_crf(released["probs"], released["image_uint8"], BOUNDARY)
    np.testing.assert_array_equal(marginals_KHW, released["train_q"])


def test_marginals_sum_to_one_and_inputs_stay_as_they_were():
    probs_KHW, image_HW3 = smooth_probs(3), IMAGE_HW3.copy()
    marginals_KHW = dense_crf(probs_KHW, image_HW3, CrfConfig())
    np.testing.assert_allclose(marginals_KHW.sum(0), 1, rtol=1e-5)
    assert np.array_equal(probs_KHW, smooth_probs(3)) and np.array_equal(image_HW3, IMAGE_HW3)


def test_read_only_and_strided_arrays_are_taken():
    want_KHW = dense_crf(smooth_probs(3), IMAGE_HW3.copy(), CrfConfig())
    read_only_HW3, flipped_HW3 = IMAGE_HW3.copy(), IMAGE_HW3[:, ::-1].copy()[:, ::-1]
    read_only_HW3.flags.writeable = False
    for image_HW3 in (read_only_HW3, flipped_HW3):
        np.testing.assert_array_equal(dense_crf(smooth_probs(3), image_HW3, CrfConfig()), want_KHW)


def test_a_stray_pixel_is_taken_over_by_its_surroundings():
    probs_2HW = np.stack([np.full((24, 20), 0.9, np.float32), np.full((24, 20), 0.1, np.float32)])
    probs_2HW[:, 12, 10] = 0.4, 0.6
    assert not refine(probs_2HW, np.full((24, 20, 3), 90, np.uint8), CrfConfig()).any()


def test_one_class_needs_no_inference():
    probs_KHW = np.stack([np.full((24, 20), 0.1), np.full((24, 20), 0.2), np.full((24, 20), 0.7)]).astype(np.float32)
    mask_HW = refine(probs_KHW, IMAGE_HW3, CrfConfig())
    assert mask_HW.dtype == np.uint8 and mask_HW.shape == (24, 20) and (mask_HW == 2).all()


def test_refinement_runs_over_the_occurring_classes_alone_and_keeps_their_indices():
    probs_2HW = smooth_probs(2)
    spread_KHW = np.full((30, 24, 20), 1e-3, np.float32)
    spread_KHW[[4, 27]] = probs_2HW
    mask_HW = refine(spread_KHW, IMAGE_HW3, CrfConfig())
    want_HW = dense_crf(probs_2HW, IMAGE_HW3, CrfConfig()).argmax(0)
    assert set(np.unique(mask_HW)) == {4, 27}
    np.testing.assert_array_equal(mask_HW, np.array([4, 27], np.uint8)[want_HW])
