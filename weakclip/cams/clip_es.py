"""CAMs by a frozen CLIP without any training: the source `clip` (CLIP-ES, Lin et al., CVPR 2023)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from weakclip.cams.texts import PromptedClip
from weakclip.config import Config
from weakclip.data.index import Index
from weakclip.data.sample import Cam, DecodedSample
from weakclip.data.stream import StoredSamples
from weakclip.datasets import writing

PROMPT = "prompt"
"""Key in the set's build.json that holds the chosen template."""

_log = logging.getLogger(__name__)


def maker(config: Config, labelled: Index) -> tuple[Callable[[DecodedSample], Cam], dict[str, Any]]:
    """Return the function that makes the CAM of a sample, and the chosen template as an entry for build.json."""
    clip = PromptedClip(config, labelled.classes)
    template = choose_template(config, clip, labelled)
    return lambda sample: clip.cam(sample, template), {PROMPT: template}


def choose_template(config: Config, clip: PromptedClip, labelled: Index) -> str:
    """Return the template that the set was started with, or else the one with the lowest sharpness on a few of its images."""
    first, *others = config.cam.prompts
    if not others:
        return first
    if (earlier := writing.read_provenance(Path(config.data.train))) is not None:
        return earlier[PROMPT]
    step = max(len(labelled.entries) // config.cam.prompt_images, 1)
    some = StoredSamples(labelled, labelled.entries[::step][: config.cam.prompt_images], config.data.workers)
    found = clip.sharpness(tqdm(some, "choosing the prompt", unit=" images", disable=None))
    _log.info("sharpness: %s", ", ".join(f"{template!r} {value:.4f}" for template, value in found.items()))
    return min(found, key=found.__getitem__)
