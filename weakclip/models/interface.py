"""The interface that the training loop asks of a network; WeakCLIP and the wrappers of weakclip.networks implement it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn

from weakclip.data.photometric import Normalisation
from weakclip.masks.sliding_window import Predictor


class Targets(NamedTuple):
    """What a batch is trained towards, on the device."""

    images_B3HW: Tensor
    """The network's input."""
    seeds_BHW: Tensor
    """int64, class indices and 255."""
    labels_BK: Tensor
    """uint8, 1 for each class that the whole image has; never for background."""


class Group(NamedTuple):
    """Parameters that share their optimiser's settings."""

    parameters: list[nn.Parameter]
    lr: float
    """Factor on `optim.lr`."""


class Trained(nn.Module, ABC):
    """A network that the loop can train."""

    normalisation: Normalisation

    @property
    def frozen(self) -> int:
        """How many parameters it holds beside the module's own, which nothing trains, shards or saves."""
        return 0

    def twin(self) -> Trained:
        """A copy that shares what is frozen."""
        return copy.deepcopy(self)

    def predictor(self) -> Predictor:
        """For inference, of networks that segment; see weakclip.masks.sliding_window."""
        raise NotImplementedError(f"{type(self).__name__} does not segment")

    @abstractmethod
    def losses(self, output: Any, targets: Targets) -> dict[str, Tensor]:
        """Of what `forward` gave for `targets.images_B3HW`, by name; their sum is what is minimised."""

    def groups(self) -> list[Group]:
        """All parameters that are trained."""
        return [Group([parameter for parameter in self.parameters() if parameter.requires_grad], 1.0)]
