"""CAMs by MCTformer, which the stage `classify` has trained on image labels: the source `mctformer` (Xu et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from weakclip.cams import maps
from weakclip.checkpoints import weights
from weakclip.config import Config
from weakclip.data.index import Index
from weakclip.data.photometric import IMAGENET
from weakclip.data.sample import Cam, DecodedSample
from weakclip.data.transforms import Size
from weakclip.datasets.cam_files import pack_cam, quarter
from weakclip.networks.mctformer import MCTformer
from weakclip.networks.wrappers import build_classification


def maker(config: Config, labelled: Index) -> tuple[Callable[[DecodedSample], Cam], dict[str, Any]]:
    """Return the function that makes the CAM of a sample, and {} for build.json. Raises UserError without trained weights."""
    model = build_classification(config, len(labelled.classes), pretrained=False)
    network = weights.load_into(model, config.run_dir.classifier.find_weights("last")).network
    return lambda sample: cam_of(network, sample, config), {}


def cam_of(network: MCTformer, sample: DecodedSample, config: Config) -> Cam:
    """Return the maps of all classes that the image is labelled with, at a quarter of its height and width."""
    options = config.cam
    maps_nhw = activation_maps(
        network,
        sample.image,
        sample.classes,
        scales=options.scales,
        flip=options.flip,
        attention_blocks=options.attention_blocks,
        affinity_steps=options.affinity_steps,
        scale=config.data.scale,
        size=quarter(sample.size),
    )
    return pack_cam(dict(zip(sample.classes, maps_nhw, strict=True)), sample.size, sample.name)


def activation_maps(
    network: MCTformer,
    image_HW3: np.ndarray,
    classes: Sequence[int],
    *,
    scales: Sequence[float],
    flip: bool,
    attention_blocks: int,
    affinity_steps: int,
    scale: Sequence[int],
    size: Size,
) -> np.ndarray:
    """Return the maps of these classes, float32 n x `size`, each in 0..1, or all 0 where the network finds nothing.

    image_HW3: uint8 RGB. classes: indices from 1 to K - 1. scales: factors on `scale`, which is `data.scale`; the maps are
    averaged over them and, with `flip`, over the flipped images, before they are stretched to 0..1, as in the released code.
    affinity_steps: how often the affinity is applied, 0: not at all. size: h, w of the maps. The network must be in eval mode.
    Published: scale 1.0 with flip, 3 attention blocks, 1 affinity step.
    """
    rows = [index - 1 for index in classes]

    def maps_of(image_13HW: Tensor) -> Tensor:
        found = network.maps(image_13HW, attention_blocks)
        maps_nL = refine(found.maps_BChw[0, rows].flatten(1), found.affinity_BLL[0], affinity_steps)
        return maps_nL.unflatten(1, found.maps_BChw.shape[2:])

    device = network.cls_token.device
    images = (maps.network_input(network.patch, image_HW3, IMAGENET, scale, factor, device) for factor in scales)
    return maps.average_maps(maps_of, images, flip, size)


def refine(maps_nL: Tensor, affinity_LL: Tensor, steps: int) -> Tensor:
    """Return the maps after `steps` multiplications by the affinity, n x L (the released engine.py does one).

    Each patch becomes the sum of the map weighted by the patch's row of the affinity.
    """
    for _ in range(steps):
        maps_nL = maps_nL @ affinity_LL.T
    return maps_nL
