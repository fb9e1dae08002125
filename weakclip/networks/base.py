"""What the networks for retraining share: their interface, and reading the file of a pre-trained backbone."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path

from torch import Tensor, nn

from weakclip.checkpoints import weight_files
from weakclip.config import ConfigError
from weakclip.data.photometric import IMAGENET, Normalisation

OTHER_BACKBONE = "use the weights of the backbone that the recipe names"


class Network(nn.Module):
    """A segmentation network: normalised images [B, 3, H, W] with sides of `least_side` or more -> logits [B, K, h, w].

    The logits are at the network's own resolution and cover the image: resize them bilinearly (align_corners=False) to H x W.
    """

    least_side: int
    """The smallest H or W that `forward` takes, in pixels."""
    normalisation: Normalisation = IMAGENET
    """Mean and std with which images are normalised: those of the backbone's pre-training."""

    @abstractmethod
    def load_pretrained(self, path: Path) -> None:
        """Load the ImageNet weights at `path` into the backbone. Raises ConfigError if they do not fit it exactly."""

    @abstractmethod
    def head_parameters(self) -> list[nn.Parameter]:
        """Return the parameters without pre-trained weights; published recipes may give them their own learning rate."""


def read_backbone(path: Path, *classifiers: str) -> dict[str, Tensor]:
    """Return the tensors in a weight file, or in a directory in Hugging Face's layout, without those of the `classifiers`.

    classifiers: prefixes of the names of the ImageNet classifier's tensors.
    Raises ConfigError naming the file that is missing or cannot be read.
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
