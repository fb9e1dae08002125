"""Weights that have a name: a tag of open_clip, or a repository on the Hugging Face Hub -> files in the Hub's cache.

open_clip downloads them. What is in the cache is taken as it is, without asking the Hub, so that a run that resumes has the same
weights, and a node without a network does not wait for one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import huggingface_hub

from weakclip.checkpoints.clip_files import OPEN_CLIP
from weakclip.config import ConfigError
from weakclip.models.architectures import open_clip
from weakclip.runtime.ranks import on_first

HUGGING_FACE, PREPROCESSOR = "config.json", "preprocessor_config.json"
"""Files beside the weights: transformers' architecture, and its preprocessing."""

WEIGHTS = {
    OPEN_CLIP: ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    HUGGING_FACE: ("model.safetensors", "pytorch_model.bin"),
}
"""The weights that a repository may hold beside the file that states their architecture; the first one that it has is taken."""

_log = logging.getLogger(__name__)


def weights_of(tag: str, model: str, cfg: Mapping[str, Any]) -> Path:
    """Return the file of weights of open_clip's `tag` of `model`, whose entry in open_clip is `cfg`. Raises ConfigError."""
    repository = cfg["hf_hub"].rpartition("/")[0]

    def find() -> str:
        return _cached(repository, *WEIGHTS[OPEN_CLIP]) or open_clip.pretrained.download_pretrained(cfg)

    return _on_this_node(find, f"{tag} of {model}", f"{repository} --include 'open_clip*'")


def folder_of(repository: str) -> Path:
    """Return the folder of a repository's files, which is of open_clip's layout or of transformers'. Raises ConfigError."""

    def find() -> str:
        for settings, weights in WEIGHTS.items():
            if (found := _cached(repository, settings)) and _cached(repository, *weights):
                return found
        found = _download(repository, *WEIGHTS)
        if Path(found).name == HUGGING_FACE:
            with suppress(FileNotFoundError):
                _download(repository, PREPROCESSOR)
        _download(repository, *WEIGHTS[Path(found).name])
        return found

    return _on_this_node(find, repository, repository).parent


def _cached(repository: str, *names: str) -> str | None:
    """Return the first of these files that is in the cache."""
    found = (huggingface_hub.try_to_load_from_cache(repository, name) for name in names)
    return next((path for path in found if isinstance(path, str)), None)


def _download(repository: str, *names: str) -> str:
    """Return the first of these files that is cached, or else that the repository has.

    Raises FileNotFoundError, as open_clip does for any failure.
    """
    if found := _cached(repository, *names):
        return found
    *others, last = names
    for name in others:
        with suppress(FileNotFoundError):
            return open_clip.pretrained.download_pretrained_from_hf(repository, filename=name)
    return open_clip.pretrained.download_pretrained_from_hf(repository, filename=last)


def _on_this_node(find: Callable[[], str], what: str, arguments: str) -> Path:
    """Return the file that `find` leaves in the cache. Rank 0 calls it first, then each rank that does not see its cache.

    arguments: those of `hf download` for the same files.
    """

    def fetch() -> Path:
        _log.info("clip.pretrained: taking %s from the cache, or downloading it", what)
        try:
            with _quiet():
                return Path(find())
        except Exception as error:  # huggingface_hub and urllib raise almost anything without a network
            reason = " ".join(str(error).split())[:200]
            folder = f"weights/{arguments.partition(' ')[0].rpartition('/')[2]}"
            raise ConfigError(
                f"clip.pretrained: {what} is not in the cache and cannot be downloaded ({type(error).__name__}: {reason}); with "
                f"a network, as on a login node, run: hf download {arguments} --local-dir {folder}; then set "
                f"clip.pretrained={folder} clip.model=null"
            ) from error

    file = on_first(fetch)
    return file if file.exists() else fetch()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the Hub's client from printing a warning for each of its attempts to connect."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
