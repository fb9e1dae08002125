"""What differs between training jobs: the network, its targets, and its visualisation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from weakclip import labels
from weakclip.cams import mctformer
from weakclip.checkpoints import weights
from weakclip.config import ConfigError, require_whole_patches
from weakclip.data.index import Index
from weakclip.data.sample import DecodedSample, OpenSample
from weakclip.evaluation import visualize
from weakclip.masks import mask_folder, sliding_window
from weakclip.masks.seeds import cam_maps, seed_mask
from weakclip.masks.sliding_window import Predictor
from weakclip.models.interface import Trained
from weakclip.models.load import load_weakclip
from weakclip.models.weakclip import WeakCLIP
from weakclip.networks.wrappers import build_classification, build_segmentation
from weakclip.training.jobs import Job

COMPILED_FROM = 1000
"""Number of images from which compiling pays: it takes a minute or two, and saved 0.08 s an image in an experiment on an H100."""


class Task(ABC):
    """The network of a job and its targets. It is pickled into loader processes."""

    def __init__(self, job: Job) -> None:
        self.job = job

    @abstractmethod
    def build(self, pretrained: bool) -> Trained:
        """Return the network, randomly initialized or, if `pretrained`, with the weights that the recipe names."""

    @abstractmethod
    def target(self, sample: OpenSample) -> np.ndarray:
        """Return the target mask of a sample: class indices and 255 (ignore), uint8 H x W of its image's size."""

    @abstractmethod
    def columns(self, model: Trained, sample: DecodedSample) -> list[np.ndarray]:
        """Return the images that TensorBoard shows beside a training image, each uint8 H x W x 3."""

    def inputs(self, data: Sequence[Index]) -> list[str]:
        """Return fingerprints of the inputs other than the shards. Raises ConfigError when something is missing."""
        return []

    def load(self, path: Path) -> Trained:
        """Return the network with the weights in `path`, in evaluation mode, on the GPU if there is one.

        Raises ArchiveError when they are unreadable, ConfigError when they belong to another network.
        """
        return weights.load_into(self.build(pretrained=False), path)

    def _prediction(self, model: Any, sample: DecodedSample) -> np.ndarray:
        """Return the network's single-scale prediction in palette colours, uint8 H x W x 3."""
        single = self.job.inference.single_scale()
        probs_KHW = sliding_window.predict(model.predictor(), sample.image, single, self.job.data.scale)
        return visualize.colour_mask(probs_KHW.argmax(0).cpu().numpy())


class Refine(Task):
    """WeakCLIP, trained on seeds from CAMs."""

    def build(self, pretrained: bool) -> Trained:
        model = WeakCLIP(self.job.recipe, self.job.names, strict=not self.job.run.checkpoints())
        require_whole_patches("augment.crop", self.job.augment.crop, model.clip.vision.patch)
        return model

    def target(self, sample: OpenSample | DecodedSample) -> np.ndarray:
        return seed_mask(sample, self.job.recipe.seeds)

    def columns(self, model: Trained, sample: DecodedSample) -> list[np.ndarray]:
        cam = [] if sample.cam is None else [visualize.heat(sample.image, cam_maps(sample))]
        return [*cam, visualize.colour_mask(self.target(sample)), self._prediction(model, sample)]

    def load(self, path: Path) -> Trained:
        return load_weakclip(self.job.recipe, path)


class Retrain(Task):
    """A fully supervised segmentation network, trained on WeakCLIP's pseudo masks or on the seeds themselves."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.masks = None if job.recipe.retrain.targets == "seeds" else job.recipe.run_dir.pseudo

    def build(self, pretrained: bool) -> Trained:
        return build_segmentation(self.job.recipe, len(self.job.names), pretrained)

    def target(self, sample: OpenSample | DecodedSample) -> np.ndarray:
        if self.masks is None:
            return seed_mask(sample, self.job.recipe.seeds)
        return mask_folder.read_target(self.masks, sample.name, sample.size, len(self.job.names))

    def columns(self, model: Trained, sample: DecodedSample) -> list[np.ndarray]:
        return [visualize.colour_mask(self.target(sample)), self._prediction(model, sample)]

    def inputs(self, data: Sequence[Index]) -> list[str]:
        if self.masks is None:
            return []
        entries = [entry for index in data for entry in index.entries]
        if missing := mask_folder.missing(self.masks, entries):
            raise ConfigError(
                f"{self.masks}: {len(missing)} of {len(entries)} pseudo masks are missing, the first {missing[0].name}.png; "
                "write them with: weakclip pseudo"
            )
        return [mask_folder.fingerprint(self.masks)]


class Classify(Task):
    """MCTformer, trained on image labels."""

    def build(self, pretrained: bool) -> Trained:
        return build_classification(self.job.recipe, len(self.job.names), pretrained)

    def target(self, sample: OpenSample) -> np.ndarray:
        return np.full(sample.size, labels.IGNORE, np.uint8)

    def columns(self, model: Any, sample: DecodedSample) -> list[np.ndarray]:
        cam = mctformer.cam_of(model.network, sample, self.job.recipe)
        return [visualize.heat(sample.image, cam_maps(replace(sample, cam=cam)))]


_TASKS: dict[str, type[Task]] = {"classify": Classify, "train": Refine, "retrain": Retrain}


def task_of(job: Job) -> Task:
    """Return the task of a job."""
    return _TASKS[job.name](job)


def predictor_of(job: Job, weights: Path, images: int) -> Predictor:
    """Return the network of a job with the weights in a file, ready to segment `images` images."""
    model = task_of(job).load(weights)
    model.cast_frozen()
    predictor = model.predictor()
    if job.name != "train" or predictor.device.type == "cpu":  # other networks have no regions, and on a CPU nothing is gained
        return predictor
    return predictor._replace(compiled={"on": True, "off": False, "auto": images >= COMPILED_FROM}[job.train.compile])
