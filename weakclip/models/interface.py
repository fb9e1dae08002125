"""The interface that the training loop needs of a network; WeakCLIP and the wrappers of weakclip.networks implement it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn

from weakclip.data.photometric import Normalisation
from weakclip.masks.sliding_window import Predictor


class Targets(NamedTuple):
    """The targets of a batch, on the device."""

    images_B3HW: Tensor
    """The network's input: normalised images."""
    seeds_BHW: Tensor
    """int64, class indices and 255."""
    labels_BK: Tensor
    """uint8, 1 for each class that the whole image has; never for background."""


class Group(NamedTuple):
    """Parameters that share optimizer settings."""

    parameters: list[nn.Parameter]
    lr: float
    """Factor on `optim.lr`."""


class Trained(nn.Module, ABC):
    """A network that the training loop can train."""

    normalisation: Normalisation

    @property
    def frozen(self) -> int:
        """Number of parameters kept outside the module tree, which are never trained, sharded or saved."""
        return 0

    def twin(self) -> Trained:
        """Return a copy that shares the frozen parameters."""
        return copy.deepcopy(self)

    def cast_frozen(self) -> None:
        """Convert frozen weights to the type in which they are used, for the same results. Networks without any do nothing."""

    def predictor(self) -> Predictor:
        """Return the network for inference, if it segments images; see weakclip.masks.sliding_window."""
        raise NotImplementedError(f"{type(self).__name__} does not segment")

    @abstractmethod
    def losses(self, output: Any, targets: Targets) -> dict[str, Tensor]:
        """Return the losses of `output`, which `forward` gave for `targets.images_B3HW`, by name; their sum is minimised."""

    def groups(self) -> list[Group]:
        """Return all trained parameters, in groups."""
        return [Group([parameter for parameter in self.parameters() if parameter.requires_grad], 1.0)]
