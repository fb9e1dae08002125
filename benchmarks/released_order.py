"""A training step in the released code's order of work, written in our own words.

What it does, as the released code (hustvl/WeakCLIP, b72d559) does: fp32, a backward pass through both towers, all layers of both
co-attention branches, the pyramid's largest map, the concatenated score map at every level, the dense CRF of one image after the
other on the CPU, and a matrix of nearest neighbours that enters no loss. Weights are random; results are those of WeakCLIP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from weakclip import labels
from weakclip.config import BoundaryConfig, Config
from weakclip.data.stream import Batch
from weakclip.models.losses import LossInputs, weighted_losses
from weakclip.models.weakclip import WeakCLIP
from weakclip.runtime import compilation

NEIGHBOURS = 10
Part = Callable[[str], AbstractContextManager[None]]


@contextmanager
def _untimed(_name: str) -> Iterator[None]:
    yield


class ReleasedOrder:
    """The released code's training step."""

    def __init__(self, config: Config, device: torch.device) -> None:
        config = replace(config, precision="fp32", boundary=BoundaryConfig(engine="lattice"))
        self.model = WeakCLIP(config, labels.class_names(config.classes)).to(device).train()
        self.model.clip.requires_grad_(True)
        self.model.requires_grad_(True)
        self.device = device
        parameters = [*self.model.parameters(), *self.model.clip.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=config.optim.lr, weight_decay=config.optim.weight_decay)

    def step(self, batch: Batch) -> None:
        self.parts(batch, _untimed)

    def parts(self, batch: Batch, part: Part) -> None:
        """Do a step, each part of it in the context `part(name)`."""
        with compilation.paused():
            self._parts(batch, part)

    def _parts(self, batch: Batch, part: Part) -> None:
        model = self.model
        images_B3HW = model.normalisation.apply(batch.images.float())
        with part("vision tower"):
            features = model.clip.vision(images_B3HW, drop_path=True)
        with part("text tower"):
            text_KE = model.clip.text(model.names_KL, model.prompts_ND)
        with part("matching"):
            scores_BKhw = self._match(text_KE, features.global_BE, features.visual_BEhw)
        with part("adapter and neck"):
            levels = self._neck(self._pyramid(features.taps), scores_BKhw)
        with part("head"):
            logits_BKhw = self._head(levels)
        with part("neighbour matrix"):
            self._neighbours(levels[0].detach())
        with part("losses with CRF"):
            inputs = LossInputs(logits_BKhw, scores_BKhw, batch.seeds.long(), images_B3HW, model.loss, model.boundary)
            total = torch.stack(list(weighted_losses(inputs).values())).sum()
        with part("backward"):
            total.backward()
        with part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _match(self, text_KE: Tensor, global_BE: Tensor, visual_BEhw: Tensor) -> Tensor:
        """Run the matching with all layers, also those whose output is not used."""
        matching = self.model.matching
        context_BME = torch.cat([global_BE.unsqueeze(1), visual_BEhw.flatten(2).transpose(1, 2)], dim=1)
        text_BKD = matching.text_proj(text_KE.expand(len(global_BE), -1, -1))
        visual_BMD = matching.visual_proj(context_BME)
        for branch, query, memory in (
            (matching.text_branch, text_BKD, visual_BMD), (matching.visual_branch, visual_BMD, text_BKD),
        ):  # fmt: skip
            for layer in branch.layers[:-1]:
                layer(query, memory)
        return matching(text_KE, global_BE, visual_BEhw)

    def _pyramid(self, taps_BDhw: list[Tensor]) -> list[Tensor]:
        adapter = self.model.adapter
        levels = [adapter.level1, adapter.level2, adapter.level3, adapter.level4]
        maps = []
        for level, x_BDhw in zip(levels, taps_BDhw, strict=True):
            for module in level if isinstance(level, torch.nn.Sequential) else [level]:
                x_BDhw = module(x_BDhw)
            maps.append(x_BDhw)
        return maps

    def _neck(self, pyramid: list[Tensor], scores_BKhw: Tensor) -> list[Tensor]:
        neck, levels = self.model.decoder.neck, []
        for lateral, x_BDHW in zip(neck.laterals, pyramid, strict=True):
            resized = F.interpolate(scores_BKhw, size=x_BDHW.shape[2:], mode="bilinear", align_corners=True)
            levels.append(F.conv2d(torch.cat([x_BDHW, resized], 1), lateral.weight, lateral.bias))
        for fine in range(len(levels) - 2, -1, -1):
            levels[fine] = levels[fine] + F.interpolate(levels[fine + 1], size=levels[fine].shape[2:], mode="nearest")
        return [output(x) for output, x in zip(neck.outputs, levels, strict=True)]

    def _head(self, levels: list[Tensor]) -> Tensor:
        head, size = self.model.decoder.head, levels[0].shape[2:]
        total = torch.zeros((), device=self.device)
        for level, (scale, x_BCHW) in enumerate(zip(head.scales, levels, strict=True)):
            for conv in scale:
                x_BCHW = conv(x_BCHW)
                if level:
                    x_BCHW = F.interpolate(x_BCHW, scale_factor=2, mode="bilinear", align_corners=False)
            total = total + F.interpolate(x_BCHW, size=size, mode="bilinear", align_corners=False)
        return head.classify(head.dropout(total))

    def _neighbours(self, features_BCHW: Tensor) -> Tensor:
        """Return which of the grid's pixels are among the nearest of each in feature space, B x N x N, image by image."""
        grid_BCGG = F.interpolate(features_BCHW, size=tuple(self.model.loss.grid), mode="bilinear")
        found = []
        for features_CN in grid_BCGG.flatten(2):
            norms_N = features_CN.square().sum(0)
            distances_NN = (norms_N[:, None] + norms_N[None] - 2 * features_CN.T @ features_CN).abs()
            limit_N1 = distances_NN.topk(NEIGHBOURS, dim=1, largest=False).values[:, -1:]
            found.append((distances_NN <= limit_N1).float() - torch.eye(len(norms_N), device=self.device))
        return torch.stack(found)
