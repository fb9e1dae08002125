"""What the training jobs differ in: the recipe's part that is theirs, the network, and what it is trained towards.

One loop (weakclip.train) trains all. Importing this module is light: a login node asks it how far a job is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weakclip import labels
from weakclip.config import Config, ConfigError
from weakclip.masks import mask_folder

if TYPE_CHECKING:
    from weakclip.data.index import Index
    from weakclip.data.sample import DecodedSample, OpenSample
    from weakclip.models.interface import Trained


ON_SEEDS = "-seeds"
"""After the network's name in the directory of a retraining that is towards the seeds, not the pseudo masks."""


class Task(ABC):
    """A training job. `config` is the job's own: its run directory, data, augmentation, optimiser and steps."""

    fixed: tuple[str, ...]
    """Keys of the config that a run must keep when it goes on."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.names = labels.class_names(config.classes)

    @property
    def run(self) -> Path:
        return Path(self.config.run)

    @abstractmethod
    def build(self, pretrained: bool) -> Trained:
        """The network, random; or as training begins with it, with the weights of the recipe's `pretrained`."""

    @abstractmethod
    def target(self, sample: OpenSample) -> np.ndarray:
        """What a sample is trained towards: class indices and 255, uint8 H x W of its picture's size."""

    @abstractmethod
    def columns(self, model: Trained, sample: DecodedSample) -> list[np.ndarray]:
        """Pictures beside an image in TensorBoard, each uint8 H x W x 3."""

    def inputs(self, data: Sequence[Index]) -> list[str]:
        """What the run is of beside its shards. Raises ConfigError when something is missing."""
        return []

    def load(self, path: Path) -> Trained:
        """The network with the weights in `path`, in evaluation mode, on the GPU if there is one.

        Raises ArchiveError when they are unreadable, ConfigError when they are another network's.
        """
        from weakclip.checkpoints import weights

        return weights.load_into(self.build(pretrained=False), path)


class Refine(Task):
    """WeakCLIP, on the seeds that CAMs give: the stage `train`."""

    fixed = ("seed", "classes", "seeds", "augment", "clip", "prompts", "adapter", "matching", "decoder", "loss", "demo")

    def __init__(self, config: Config) -> None:
        """Raises ConfigError when seeds are to be refined that no stage makes."""
        super().__init__(config)
        if config.seeds.crf is not None and config.cam.data is None:
            raise ConfigError("seeds.crf: the stage cam makes such seeds, but cam.data is null; set it, or leave seeds.crf out")

    def build(self, pretrained: bool) -> Trained:
        from weakclip.models.weakclip import WeakCLIP

        return WeakCLIP(self.config, self.names)

    def target(self, sample: OpenSample) -> np.ndarray:
        from weakclip.masks.seeds import seed_mask

        return seed_mask(sample, self.config.seeds)

    def columns(self, model: Trained, sample: DecodedSample) -> list[np.ndarray]:
        from weakclip.evaluation import visualize
        from weakclip.masks.seeds import cam_maps, seed_mask

        seed_HW = seed_mask(sample, self.config.seeds)
        cam = [] if sample.cam is None else [visualize.heat(sample.image, cam_maps(sample))]
        return [*cam, visualize.colour_mask(seed_HW), _prediction(self.config, model, sample)]

    def load(self, path: Path) -> Trained:
        from weakclip.checkpoints import weights

        return weights.load_model(self.config, path)


class Retrain(Task):
    """An ordinary segmentation network, on WeakCLIP's pseudo masks or on the seeds themselves."""

    fixed: tuple[str, ...] = ("seed", "classes", "retrain.augment", "retrain.network", "retrain.backbone", "retrain.pretrained")

    def __init__(self, config: Config) -> None:
        """Raises ConfigError when the recipe names no network."""
        ours, parent = config.retrain, config.run
        if ours.network is None:
            raise ConfigError("retrain.network is null: it names what is trained on the pseudo masks, such as segformer")
        on_seeds = ours.targets == "seeds"
        run = f"{parent}/retrain/{ours.network}{ON_SEEDS if on_seeds else ''}"
        super().__init__(replace(config, run=run, augment=ours.augment, optim=ours.optim, train=ours.train, pseudo=ours.test))
        self.masks = None if on_seeds else Path(parent) / "pseudo"
        if on_seeds:
            self.fixed = (*self.fixed, "seeds")

    def build(self, pretrained: bool) -> Trained:
        from weakclip.networks import build
        from weakclip.networks.wrappers import Segmentation

        config = self.config
        network = build(config.retrain, len(self.names))
        if pretrained and config.retrain.pretrained is not None:
            network.load_pretrained(Path(config.retrain.pretrained))
        return Segmentation(network, len(self.names), config.retrain.head_lr, config.precision)

    def target(self, sample: OpenSample | DecodedSample) -> np.ndarray:
        if self.masks is None:
            from weakclip.masks.seeds import seed_mask

            return seed_mask(sample, self.config.seeds)
        return mask_folder.read_target(self.masks, sample.key, sample.size, len(self.names))

    def columns(self, model: Trained, sample: DecodedSample) -> list[np.ndarray]:
        from weakclip.evaluation import visualize

        return [visualize.colour_mask(self.target(sample)), _prediction(self.config, model, sample)]

    def inputs(self, data: Sequence[Index]) -> list[str]:
        if self.masks is None:
            return []
        entries = [entry for index in data for entry in index.entries]
        if missing := mask_folder.missing(self.masks, entries):
            raise ConfigError(
                f"{self.masks}: {len(missing)} of {len(entries)} pseudo masks are missing, the first {missing[0].key}.png; "
                "write them with python -m weakclip.pseudo"
            )
        return [mask_folder.fingerprint(self.masks)]


class Classify(Task):
    """MCTformer, on the image labels of `cam.data`."""

    fixed = ("seed", "classes", "classify.augment", "classify.backbone", "classify.pretrained", "classify.drop_path")

    def __init__(self, config: Config) -> None:
        """Raises ConfigError when the recipe has no labelled set."""
        ours = config.classify
        if config.cam.data is None or config.cam.source != "mctformer":
            raise ConfigError("nothing to classify: set cam.source to mctformer, and cam.data to the shard set with labels")
        data = replace(config.data, train=config.cam.data, mix={}, val=None, build=[])
        cam = replace(config.cam, data=None)
        super().__init__(
            replace(
                config,
                run=f"{config.run}/classify",
                data=data,
                cam=cam,
                augment=ours.augment,
                optim=ours.optim,
                train=ours.train,
            )
        )

    def build(self, pretrained: bool) -> Trained:
        from weakclip.networks.mctformer import MCTformer
        from weakclip.networks.wrappers import Classification

        ours = self.config.classify
        network = MCTformer(len(self.names), ours.backbone, self.config.augment.crop, ours.drop_path)
        if pretrained and ours.pretrained is not None:
            network.load_pretrained(Path(ours.pretrained))
        return Classification(network, ours.head_lr, self.config.precision)

    def target(self, sample: OpenSample) -> np.ndarray:
        return np.full(sample.size, labels.IGNORE, np.uint8)

    def columns(self, model: Trained, sample: DecodedSample) -> list[np.ndarray]:
        from weakclip.evaluation import visualize
        from weakclip.masks.seeds import cam_maps

        maps_nHW = cam_maps(replace(sample, cam=model.cam(sample, self.config)))  # type: ignore[operator]
        return [visualize.heat(sample.image, maps_nHW)]


def _prediction(config: Config, model: Any, sample: DecodedSample) -> np.ndarray:
    from weakclip.evaluation import visualize
    from weakclip.masks import sliding_window

    probs_KHW = sliding_window.predict(model.predictor(), sample.image, config.pseudo.single_scale(), config.data.scale)
    return visualize.colour_mask(probs_KHW.argmax(0).cpu().numpy())


TASKS: dict[str, type[Task]] = {"classify": Classify, "train": Refine, "retrain": Retrain}
"""By the name of the stage."""
