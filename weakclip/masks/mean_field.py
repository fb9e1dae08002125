"""The exact mean field of a dense CRF, as batched matrix products on the device.

The permutohedral lattice of pydensecrf (crf.py) approximates the kernels; here they are evaluated between all pairs of N = H x W
pixels. With 64 x 64 pixels that is 4096 x 4096 values an image, which a GPU multiplies faster than a CPU builds the lattice.
(Kraehenbuehl & Koltun, 2011, equations 3 and 4; normalised symmetrically as in their code.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weakclip.config import CrfConfig
from weakclip.runtime.compilation import region

PAIRS_AT_ONCE = 1 << 26
"""Pairs of pixels that a GPU computes at once: 4 images of 64 x 64, which take about 1 GiB."""


def mean_field(probs_BKHW: Tensor, images_BHW3: Tensor, config: CrfConfig, products: torch.dtype | None = None) -> Tensor:
    """Return the mean-field marginals, B x K x H x W in the type of the probabilities, on their device.

    probs_BKHW: class probabilities; they need not sum to one. images_BHW3: RGB in 0..255. products: the type of the matrix
    products, which are accumulated in fp32 or better; None: bf16 on GPUs, otherwise that of the probabilities.
    """
    if products is None:
        products = torch.bfloat16 if probs_BKHW.is_cuda else probs_BKHW.dtype
    pairs = probs_BKHW[0, 0].numel() ** 2
    images_at_once = max(1, PAIRS_AT_ONCE // pairs) if probs_BKHW.is_cuda else 1  # a CPU's caches hold a part of one
    chunks = zip(probs_BKHW.split(images_at_once), images_BHW3.split(images_at_once), strict=True)
    return torch.cat([_marginals(probs, images, config, products) for probs, images in chunks])


@region
def _marginals(probs_BKHW: Tensor, images_BHW3: Tensor, config: CrfConfig, products: torch.dtype) -> Tensor:
    unary_BNK = probs_BKHW.flatten(2).transpose(1, 2).clamp(1e-5, 1).log()
    K = unary_BNK.shape[2]
    unary_BNK = F.pad(unary_BNK, (0, -K % 8), value=-torch.inf)  # rows of 16 bytes, for the tensor cores
    weights_BNN = pairwise(images_BHW3.to(probs_BKHW.dtype), config).to(products)
    q_BNK = unary_BNK.softmax(2)
    for _ in range(config.iterations):
        q_BNK = (unary_BNK + weights_BNN @ q_BNK.to(products)).softmax(2)
    return q_BNK[..., :K].transpose(1, 2).unflatten(2, probs_BKHW.shape[2:])


def pairwise(images_BHW3: Tensor, config: CrfConfig) -> Tensor:
    """Return the weight of each pair of pixels, B x N x N: both kernels, normalised, times their compatibilities."""
    _, H, W, _ = images_BHW3.shape
    rows, columns = (torch.arange(side, device=images_BHW3.device, dtype=images_BHW3.dtype) for side in (H, W))
    yx_N2 = torch.cartesian_prod(rows, columns)
    colours_BN3 = images_BHW3.flatten(1, 2) / config.bilateral_srgb
    gaussian_1NN = _kernel((yx_N2 / config.gaussian_sxy)[None])
    bilateral_BNN = _kernel(torch.cat([(yx_N2 / config.bilateral_sxy).expand(len(colours_BN3), -1, -1), colours_BN3], 2))
    return config.gaussian_compat * gaussian_1NN + config.bilateral_compat * bilateral_BNN


def _kernel(features_BNF: Tensor) -> Tensor:
    """Return D^-1/2 K D^-1/2 with K = exp(-|f_i - f_j|^2 / 2) and D its sums of rows, B x N x N."""
    # Differences, not a matrix product: |f|^2 reaches 1200, where fp32 would lose the digits that decide among near neighbours.
    distance_BNN = torch.zeros((), dtype=features_BNF.dtype, device=features_BNF.device)
    for f_BN in features_BNF.unbind(2):
        distance_BNN = distance_BNN + (f_BN[:, :, None] - f_BN[:, None, :]).square()
    kernel_BNN = (-0.5 * distance_BNN).exp()
    scale_BN = kernel_BNN.sum(2).rsqrt()
    return kernel_BNN * scale_BN[:, :, None] * scale_BN[:, None, :]
