"""Dense CRF (Kraehenbuehl & Koltun, 2011): mean-field inference on pydensecrf's permutohedral lattice."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np
import pydensecrf.densecrf as densecrf
from pydensecrf.utils import unary_from_softmax

from weakclip.config import CrfConfig
from weakclip.runtime.workers import WorkerPool

# The CRF of the boundary loss (released code: sxy 3 / 80, srgb 13, compat 3 / 10, ten iterations).
BOUNDARY = CrfConfig(bilateral_sxy=80, bilateral_srgb=13, bilateral_compat=10)


def dense_crf(probs_KHW: np.ndarray, image_HW3: np.ndarray, config: CrfConfig) -> np.ndarray:
    """Return the mean-field marginals of a dense CRF, float32 K x H x W.

    probs_KHW: class probabilities, float32; they need not sum to one. image_HW3: uint8 RGB of the same size.
    """
    K, H, W = probs_KHW.shape
    field = densecrf.DenseCRF2D(W, H, K)
    field.setUnaryEnergy(np.ascontiguousarray(unary_from_softmax(probs_KHW)))
    field.addPairwiseGaussian(sxy=config.gaussian_sxy, compat=config.gaussian_compat)
    image_HW3 = image_HW3 if image_HW3.flags.writeable else image_HW3.copy()  # pydensecrf refuses read-only arrays
    field.addPairwiseBilateral(
        sxy=config.bilateral_sxy,
        srgb=config.bilateral_srgb,
        rgbim=np.ascontiguousarray(image_HW3),
        compat=config.bilateral_compat,
    )
    return np.asarray(field.inference(config.iterations), np.float32).reshape(K, H, W)


def boundary_crfs(pairs: Iterable[tuple[np.ndarray, np.ndarray]], processes: int) -> list[np.ndarray]:
    """Return the marginals of the boundary loss' CRF for pairs of probabilities and image, as `dense_crf` takes them.

    They are computed by that number of worker processes, which stay for the next call, or by this process if it is 1 or less.
    """
    return [*_workers(processes if processes > 1 else 0).map(_boundary_crf, pairs)]


@cache
def _workers(processes: int) -> WorkerPool:
    return WorkerPool(processes)


def _boundary_crf(pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return dense_crf(*pair, BOUNDARY)


def refine(probs_KHW: np.ndarray, image_HW3: np.ndarray, config: CrfConfig) -> np.ndarray:
    """Return a mask, uint8 H x W: the argmax of a dense CRF over the classes that win at least one pixel of `probs_KHW`."""
    occurring = np.unique(probs_KHW.argmax(0))
    if len(occurring) == 1:  # nothing to decide, and the lattice needs two labels
        return np.full(image_HW3.shape[:2], occurring[0], np.uint8)
    marginals_nHW = dense_crf(probs_KHW[occurring], image_HW3, config)
    return occurring[marginals_nHW.argmax(0)].astype(np.uint8)
