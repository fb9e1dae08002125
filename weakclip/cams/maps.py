"""Functions shared by all CAM sources: the network's input, averaging maps over scales and flips, and stretching them to 0..1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weakclip.data.photometric import Normalisation
from weakclip.data.transforms import Size, resize_image, scaled_size


def average_maps(maps_of: Callable[[Tensor], Tensor], images: Iterable[Tensor], flip: bool, size: Size) -> np.ndarray:
    """Return the maps averaged over `images`, one image at several sizes: float32 n x `size`, each in 0..1, or all 0.

    maps_of: an image, 1 x 3 x H x W -> its maps, n x h x w. flip: average over each image and its horizontal flip.
    """
    found = []
    for image_13HW in images:
        for flipped in (False, True) if flip else (False,):
            maps_nhw = maps_of(image_13HW.flip(3) if flipped else image_13HW)
            maps_nhw = F.interpolate(maps_nhw[None], size=size, mode="bilinear")[0]
            found.append(maps_nhw.flip(2) if flipped else maps_nhw)
    total_nhw = torch.stack(found).sum(0)
    return stretch(total_nhw.flatten(1)).view_as(total_nhw).cpu().numpy()


def network_input(
    patch: int, image_HW3: np.ndarray, normalisation: Normalisation, scale: Sequence[int], factor: float, device: torch.device
) -> Tensor:
    """Return the image resized to fit into `scale` times `factor` and normalised, float32 1 x 3 x H x W.

    Its sides are rounded to multiples of `patch`.
    """
    H, W = image_HW3.shape[:2]
    sides = scaled_size(H, W, scale, factor)
    height, width = (max(round(side / patch), 1) * patch for side in sides)
    resized_13HW = torch.from_numpy(resize_image(image_HW3, (height, width))).to(device).permute(2, 0, 1)[None].float()
    return normalisation.apply(resized_13HW)


def stretch(maps_nL: Tensor) -> Tensor:
    """Return each map min-max scaled to 0..1; a constant map becomes 0.

    Affinity adds a small offset everywhere in a map, which dividing by the maximum alone would keep.
    """
    maps_nL = maps_nL - maps_nL.amin(1, keepdim=True)
    top_n1 = maps_nL.amax(1, keepdim=True)
    return maps_nL / top_n1.where(top_n1 > 0, 1.0)
