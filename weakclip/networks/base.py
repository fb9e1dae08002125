"""What the networks for retraining have in common: their interface, and how the file of a pre-trained backbone is read."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

from torch import Tensor, nn

from weakclip.checkpoints import weight_files
from weakclip.config import ConfigError
from weakclip.data.photometric import IMAGENET, Normalisation

OTHER_BACKBONE = "the file must be of the backbone that was asked for"


class Network(nn.Module):
    """A segmentation network: normalised images [B, 3, H, W], of any sides from `least_side` on -> logits [B, K, h, w].

    The logits are at the network's own resolution and cover the image: resize them bilinearly (align_corners=False) to H x W.
    """

    least_side: int
    """The smallest H or W that `forward` takes, in pixels."""
    normalisation: Normalisation = IMAGENET
    """What the images are normalised with: that of the backbone's pre-training."""

    @abstractmethod
    def load_pretrained(self, path: Path) -> None:
        """Load the ImageNet weights at `path` into the backbone. Raises ConfigError where they do not fit it exactly."""

    @abstractmethod
    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters that no pre-training gave; published recipes may give them a learning rate of their own."""


def read_backbone(path: Path, *classifiers: str) -> dict[str, Tensor]:
    """The tensors in a file of weights, or in a directory as Hugging Face lays it out, without those of the `classifiers`.

    classifiers: what the names of the ImageNet classifier's tensors begin with.
    Raises ConfigError naming the file that is missing or can't be read.
    """
    if path.is_dir():
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not files:
            raise ConfigError(f"pretrained: {path} holds neither model.safetensors nor pytorch_model.bin")
        path = files[0]
    try:
        tensors = weight_files.read(path).tensors
    except weight_files.ArchiveError as error:
        raise ConfigError(f"pretrained: {error}") from error
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(classifiers)}
