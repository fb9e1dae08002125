"""A frozen CLIP with text prompts: the texts of the classes, the choice of the template, and the CAMs.

F foreground classes, M background names, n classes of an image, E joint embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from weakclip.cams import gradcam, maps
from weakclip.config import Config, ConfigError
from weakclip.data.sample import Cam, DecodedSample
from weakclip.datasets.cam_files import pack_cam, quarter
from weakclip.models.clip import FrozenClip, tokenize


class Texts(NamedTuple):
    """Unit embeddings of one template's texts."""

    classes_FE: Tensor
    """Those of classes 1, 2, ..."""
    background_ME: Tensor

    def competing(self, classes: Sequence[int]) -> Tensor:
        """Return an image's classes (indices from 1), then their competitors: the background names, or else all other classes."""
        present = [index - 1 for index in classes]
        others = [row for row in range(len(self.classes_FE)) if row not in present]
        rest = self.background_ME if len(self.background_ME) else self.classes_FE[others]
        return torch.cat([self.classes_FE[present], rest])


class PromptedClip:
    """The CLIP of a config as it was trained, on the GPU if there is one, and the embeddings of its prompts' texts.

    Raises ConfigError when a text is too long for this CLIP or has a word that it does not know, or a synonym is for no class.
    """

    def __init__(self, config: Config, class_names: Sequence[str]) -> None:
        self.config = config
        names = class_names[1:]
        if unknown := config.cam.synonyms.keys() - set(names):
            raise ConfigError(f"cam.synonyms: {min(unknown)!r} is not a class of the recipe; its keys must be class names")
        named = [config.cam.synonyms.get(name, name) for name in names] + config.cam.background_names
        texts = [template.replace("{}", name) for template in config.cam.prompts for name in named]
        ids_UL = tokenize(texts)
        # WeakCLIP's published recipe doubles the class embedding; CAMs need CLIP as it was trained.
        clip = replace(config.clip, double_class_embedding=False, name_tokens=max(ids_UL.shape[1], 3))
        self.clip = FrozenClip(clip, prompts=0).to("cuda" if torch.cuda.is_available() else "cpu")
        self.normalisation = self.clip.normalisation("cam.normalisation", config.cam.normalisation)
        _check_known(self.clip, ids_UL, texts)
        rows_PUE = self._embed(ids_UL).unflatten(0, (len(config.cam.prompts), -1))
        parts = [rows_UE.split([len(names), len(config.cam.background_names)]) for rows_UE in rows_PUE]
        self.texts = {template: Texts(*part) for template, part in zip(config.cam.prompts, parts, strict=True)}

    @torch.no_grad()
    def _embed(self, ids_UL: Tensor) -> Tensor:
        device = self.clip.vision.proj.device
        nothing_0D = torch.zeros(0, self.clip.text.width, device=device)
        return F.normalize(self.clip.text(ids_UL.to(device), nothing_0D), dim=1)

    def cam(self, sample: DecodedSample, template: str) -> Cam:
        """Return the maps of all classes that the image is labelled with, at a quarter of its height and width."""
        texts_CE = self.texts[template].competing(sample.classes)
        options, scale = self.config.cam, self.config.data.scale
        n, size = len(sample.classes), quarter(sample.size)
        maps_nhw = gradcam.activation_maps(self.clip, sample.image, texts_CE, n, options, scale, size)
        return pack_cam(dict(zip(sample.classes, maps_nhw, strict=True)), sample.size, sample.name)

    def sharpness(self, samples: Iterable[DecodedSample]) -> dict[str, float]:
        """Return how unevenly each template scores the classes that an image is labelled with; lower is better (CLIP-ES).

        It is the variance of their probabilities divided by their mean, summed over the images with two labels or more.
        """
        sums = dict.fromkeys(self.texts, 0.0)
        for sample in samples:
            if len(sample.classes) > 1:
                image_E = self._embed_image(sample.image)
                for template, texts in self.texts.items():
                    found_C = gradcam.probabilities(self.clip, image_E, texts.competing(sample.classes))
                    found_n = found_C[: len(sample.classes)].double().cpu()
                    sums[template] += float(found_n.var(correction=0) / found_n.mean())
        return sums

    @torch.no_grad()
    def _embed_image(self, image_HW3: np.ndarray) -> Tensor:
        vision, options, scale, device = self.clip.vision, self.config.cam, self.config.data.scale, self.clip.vision.proj.device
        image_13HW = maps.network_input(vision.patch, image_HW3, self.normalisation, scale, options.scales[0], device)
        before = gradcam.before_last_block(vision, image_13HW, 1)
        return gradcam.pooled(vision, before, vision.blocks[-1].ln_1(before.tokens_1TD))


def _check_known(clip: FrozenClip, ids_UL: Tensor, texts: Sequence[str]) -> None:
    """Raise ConfigError for a text with an unknown word.

    Small CLIPs are stored with only those token embeddings that were trained; the others are zero.
    """
    known_V = clip.text.token_embedding.weight.any(1).cpu()
    within_UL = torch.arange(ids_UL.shape[1]) <= ids_UL.argmax(1, keepdim=True)
    unknown_U = (within_UL & ~known_V[ids_UL]).any(1)
    if unknown_U.any():
        text = texts[int(unknown_U.int().argmax())]
        raise ConfigError(
            f"this CLIP was not trained with a word of {text!r}; change cam.prompts, cam.background_names or cam.synonyms"
        )
