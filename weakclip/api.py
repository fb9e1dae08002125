"""The Python interface: `weakclip.load(RUN).predict(image)`.

Shapes: H W image pixels, K classes, 0 is background.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from weakclip import recipe
from weakclip.config import STORED, UPRIGHT, Config
from weakclip.data.orientation import orientation_of, turn
from weakclip.data.sample import IMAGES, DecodedSample, UnreadableImageError, to_rgb
from weakclip.datasets.writing import read_provenance
from weakclip.labels import index_of
from weakclip.masks.fallback import likely_classes
from weakclip.masks.finishing import mask_of
from weakclip.masks.mask_folder import MaskSettings
from weakclip.masks.sliding_window import Predictor
from weakclip.runtime.errors import UserError
from weakclip.runtime.run_dir import RunDir
from weakclip.training import jobs
from weakclip.training.tasks import task_of

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray
"""An image: a file, a Pillow image, or uint8 RGB H x W x 3."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network says of one image."""

    image_HW3: np.ndarray
    """The image, uint8 RGB."""
    mask_HW: np.ndarray
    """Class indices after the dense CRF of the recipe, uint8."""
    probs_KHW: np.ndarray
    """Probabilities before the CRF, float32. They are 0 for classes that win no pixel."""
    classes: tuple[str, ...]
    """Class names by index."""

    @property
    def found(self) -> list[str]:
        """The names of the classes in the mask, without background."""
        return [self.classes[index] for index in np.unique(self.mask_HW) if index]


@dataclass(frozen=True)
class Segmenter:
    """A trained network, ready to segment single images: WeakCLIP, or one retrained on its masks. See `load`."""

    predictor: Predictor
    settings: MaskSettings
    classes: tuple[str, ...]
    upright: bool
    """Whether photos are turned by their EXIF orientation, as those that it was trained on."""

    def predict(self, image: ImageLike, labels: Sequence[str] | None = None) -> Prediction:
        """Return the mask of an image: a file, a Pillow image or uint8 RGB H x W x 3.

        labels: names of the classes that it is known to show; only these and background can then be in the mask. None: any class.
        Raises UserError for a file that is no image and for an unknown label, OSError for a missing file.

            network = weakclip.load("runs/voc")
            prediction = network.predict("cat.jpg", labels=["cat"])
            Image.fromarray(prediction.mask_HW)
        """
        image_HW3 = self._pixels(image)
        inference = replace(self.settings.inference, restrict_to_labels=labels is not None)
        known = tuple(sorted({index_of(name, self.classes, "labels") for name in labels or ()}))
        name = image if isinstance(image, str | os.PathLike) else "the image"
        sample = DecodedSample(str(name), image_HW3, known, cam=None, seed=None, mask=None)
        found = likely_classes(self.predictor, sample, replace(self.settings, inference=inference))
        probs_KHW = np.zeros((len(self.classes), *image_HW3.shape[:2]), np.float32)
        probs_KHW[found.classes_n] = found.probs_nHW
        return Prediction(image_HW3, mask_of(found, image_HW3, inference.crf), probs_KHW, self.classes)

    def _pixels(self, image: ImageLike) -> np.ndarray:
        if isinstance(image, str | os.PathLike):
            with open(image, "rb") as stream:
                try:
                    with Image.open(stream, formats=[*IMAGES.values()]) as opened:
                        return self._pixels(opened)
                except Exception as error:  # a decoder of damaged bytes may raise anything
                    what = f"not a JPEG, PNG or WebP image, or damaged ({type(error).__name__})"
                    raise UnreadableImageError(f"{image}: {what}") from None
        if isinstance(image, Image.Image):
            orientation = orientation_of(image) if self.upright else 1
            return turn(to_rgb(image), orientation)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"an image is uint8 H x W x 3, not {image.dtype} of shape {image.shape}")
        return image


def load(run: str | Path, weights: str = "best", exif: str | None = None) -> Segmenter:
    """Return the network that a run trained, on the GPU if there is one.

    run: a run directory, such as runs/voc for its WeakCLIP or runs/voc/retrain/segformer for the network trained on its masks.
    weights: best, last or a file. exif: stored or upright, as for `weakclip build`; None: as the training set was built.
    Raises UserError when there is no such run, or no weights that fit it.
    """
    place = RunDir.existing(run)
    config = recipe.load_saved(place)
    job = jobs.retrain(config) if place.is_retrained(config.retrain.network) else jobs.refine(config)
    model = task_of(job).load(place.find_weights(weights))
    model.cast_frozen()
    settings = MaskSettings(job.inference, job.data.scale, config.seeds, workers=0)
    return Segmenter(model.predictor(), settings, job.names, (exif or _built(config)) == UPRIGHT)


def _built(config: Config) -> str:
    """Return how the photos of the training set were used: by the recipe that built it, or by its build.json, if that is here."""
    if config.data.build.source is not None:
        return config.data.build.exif
    places = [Path(place) for place in (config.data.labelled, config.data.train) if place]
    notes = [note for place in places if (note := read_provenance(place)) is not None]
    return next((note["exif"] for note in notes if "exif" in note), STORED)
