"""A folder of masks: NAME.png, 8-bit palette PNGs of class indices, and about.json, which records how they were made. On request
(`pseudo.soft`), NAME.npz holds the probabilities from which a mask was made.

NAME is the path of the image below the folder that it came from, without the suffix (weakclip.data.names).
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from weakclip import labels
from weakclip.config import Config, ConfigError, InferenceConfig, SeedConfig
from weakclip.data.codecs import encode_mask_png
from weakclip.data.index import Entry, ShardError, sha256
from weakclip.runtime.atomic import partial_prefix, write_whole


@dataclass(frozen=True)
class MaskSettings:
    """How masks are predicted, and with which seeds they are compared on the way."""

    inference: InferenceConfig
    scale: list[int]
    """`data.scale`."""
    seeds: SeedConfig
    workers: int
    """Loader processes: `data.workers`."""

    @classmethod
    def of(cls, config: Config) -> MaskSettings:
        """Return the settings of a recipe's pseudo masks."""
        return cls(config.pseudo, config.data.scale, config.seeds, config.data.workers)


HOW = ("processes", "soft", "window_batch")
"""Settings that do not decide the masks. Earlier versions recorded `window_batch`."""


def provenance(settings: MaskSettings, weights: Path) -> dict[str, Any]:
    """Return everything that decides the pixels of the masks, as a dict for JSON."""
    return {"weights": sha256(weights), "scale": settings.scale, **deciding(asdict(settings.inference))}


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """Return the provenance of the masks in `folder`; None if none have been started."""
    note = folder / "about.json"
    return deciding(json.loads(note.read_text())) if note.is_file() else None


def deciding(noted: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a noted provenance that decides the masks."""
    return {name: value for name, value in noted.items() if name not in HOW}


def open_for_writing(folder: Path, settings: MaskSettings, weights: Path) -> None:
    """Create `folder`, or check that its masks were made with the same weights and settings.

    Raises ConfigError if they were not: masks of two models are never mixed.
    """
    now, earlier = provenance(settings, weights), read_provenance(folder)
    if earlier is not None and earlier != now:
        raise ConfigError(
            f"{folder} holds masks of other weights or settings (see {folder}/about.json); choose another --out or remove it"
        )
    if earlier is None:
        folder.mkdir(parents=True, exist_ok=True)
        # Other tasks of an array may be creating it at this moment, or may have been killed while they did.
        others = (path for path in folder.iterdir() if path.name != "about.json" and path.suffix != ".partial")
        if any(read_provenance(folder) is None for _ in others):
            raise ConfigError(f"{folder} holds files that are not pseudo masks; choose another --out")
        write_whole(folder / "about.json", json.dumps(now, indent=1) + "\n")


def remove_unfinished(folder: Path, entries: Iterable[Entry]) -> None:
    """Remove half-written masks of `entries` that a killed task left. No other task makes masks of these entries."""
    own = {partial_prefix(path(folder, entry.name)) for path in (mask_path, soft_path) for entry in entries}
    for partial in folder.rglob("*.partial"):
        if partial.parent / partial.name.rpartition(".")[0].rpartition(".")[0] in own:
            partial.unlink(missing_ok=True)


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 of the provenance of the masks in `folder`."""
    return sha256(folder / "about.json")


def missing(folder: Path, entries: Iterable[Entry], soft: bool = False) -> list[Entry]:
    """Return the entries that have no mask yet, or with `soft` no probabilities."""
    made = {str(path) for path in folder.rglob("*.png")}  # listing is faster than asking for each
    made_soft = {str(path) for path in folder.rglob("*.npz")} if soft else set()

    def is_missing(name: str) -> bool:
        return str(mask_path(folder, name)) not in made or (soft and str(soft_path(folder, name)) not in made_soft)

    return [entry for entry in entries if is_missing(entry.name)]


def is_made(folder: Path, name: str, soft: bool = False) -> bool:
    """Return whether the mask of `name` exists, and with `soft` its probabilities."""
    return mask_path(folder, name).exists() and (not soft or soft_path(folder, name).exists())


def mask_path(folder: Path, name: str) -> Path:
    """Return the path of the mask of the image `name`."""
    return folder / f"{name}.png"


def soft_path(folder: Path, name: str) -> Path:
    """Return the path of the probabilities from which the mask of `name` was made."""
    return folder / f"{name}.npz"


def save_soft(classes_n: np.ndarray, probs_nHW: np.ndarray, path: Path) -> None:
    """Write probabilities in 0..1, n x H x W, as uint8 in 0..255, and their classes, n."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, classes=classes_n, probs=np.rint(255 * probs_nHW).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getvalue())


def save(mask_HW: np.ndarray, path: Path) -> None:
    """Write a mask of class indices, uint8 H x W, as an 8-bit palette PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, encode_mask_png(mask_HW))


def read(folder: Path, name: str) -> np.ndarray:
    """Return the mask NAME.png, uint8 H x W. Raises ShardError naming the file if it is missing or not an 8-bit mask."""
    path = mask_path(folder, name)
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("P", "L"):
                raise ShardError(f"{path}: must be an 8-bit palette or grey PNG, is {picture.mode}")
            return np.array(picture)
    except FileNotFoundError:
        raise ShardError(f"{path}: missing; write it with python -m weakclip.pseudo") from None
    except OSError as error:
        raise ShardError(f"{path}: {error}; remove it and run python -m weakclip.pseudo again") from None


def read_soft(folder: Path, name: str) -> np.ndarray:
    """Return the mask, uint8 H x W, that the probabilities in NAME.npz give without a CRF."""
    with np.load(soft_path(folder, name)) as found:
        return found["classes"][found["probs"].argmax(0)].astype(np.uint8)


def read_target(folder: Path, name: str, size: tuple[int, int], num_classes: int) -> np.ndarray:
    """Return the mask NAME.png as a training target, uint8 H x W. size: H, W of its image.

    Raises ShardError naming the file if it is missing or damaged, does not have this size or has classes beyond `num_classes`.
    """
    mask_HW = read(folder, name)
    if mask_HW.shape != size:
        where = mask_path(folder, name)
        raise ShardError(f"{where}: {mask_HW.shape[1]} x {mask_HW.shape[0]}, but the image is {size[1]} x {size[0]}")
    highest = mask_HW.max(where=mask_HW != labels.IGNORE, initial=0)
    if highest >= num_classes:
        raise ShardError(f"{mask_path(folder, name)}: holds class {highest}, but there are {num_classes} classes")
    return mask_HW
