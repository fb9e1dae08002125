"""MCTformer learns from labels alone."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from tests.unit.networks.test_mctformer import OPTIONS, picture, tiny
from weakclip.cams import mctformer as cam_mctformer
from weakclip.data.photometric import IMAGENET
from weakclip.networks import mctformer


def test_trained_on_labels_alone_it_finds_the_squares():
    generator, network = np.random.default_rng(0), tiny(image_size=128, drop_path=0.0).train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    for _ in range(60):
        present = [[c for c in range(3) if generator.random() < 0.5] for _ in range(8)]
        images_BHW3 = np.stack([picture(generator, classes)[0] for classes in present])
        labels_BC = torch.stack([F.one_hot(torch.tensor(c, dtype=torch.long), 3).sum(0) for c in present]).float()
        logits = network(IMAGENET.apply(torch.from_numpy(images_BHW3).permute(0, 3, 1, 2).float()))
        optimizer.zero_grad()
        sum(mctformer.losses(logits, labels_BC).values()).backward()
        optimizer.step()
    network.eval()
    hits = []
    for _ in range(8):
        image_HW3, corners = picture(generator, [0, 1, 2])
        # Without affinity: in a pretrained ViT patches attend to similar ones, but this one has not learnt it.
        options = OPTIONS | {"scale": [128, 128], "size": (32, 32), "flip": True, "affinity_steps": 0}
        maps_nhw = cam_mctformer.activation_maps(network, image_HW3, [1, 2, 3], **options)
        for map_hw, (top, left) in zip(maps_nhw, corners, strict=True):
            y, x = np.unravel_index(map_hw.argmax(), map_hw.shape)
            hits.append(top <= 4 * y + 2 < top + 48 and left <= 4 * x + 2 < left + 48)
    assert np.mean(hits) > 0.9
