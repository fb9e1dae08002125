"""Writing masks: network -> likely classes -> dense CRF -> NAME.png, for all samples in part of a shard set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from weakclip.data.index import Index, select_shards
from weakclip.data.sample import DecodedSample
from weakclip.data.stream import StoredSamples
from weakclip.masks import mask_folder
from weakclip.masks.curves import Curves
from weakclip.masks.fallback import ImageTooLargeError, NotFiniteError, likely_classes
from weakclip.masks.finishing import Unfinished, finish
from weakclip.masks.mask_folder import MaskSettings
from weakclip.masks.sliding_window import Predictor
from weakclip.runtime.workers import ON_A_GPU, WorkerPool, map_in_threads

_log = logging.getLogger(__name__)


def write_masks(
    predictor: Predictor,
    settings: MaskSettings,
    samples: Iterable[DecodedSample],
    out: Path,
    curves: Curves,
    workers: WorkerPool,
) -> None:
    """Write NAME.png of every sample into `out`; an existing mask is left unchanged.

    The network runs in this process, on several images at a time. The workers get only the likely classes, run the CRF and write
    the files meanwhile. On a CPU, one image per worker is in progress, each on one core from the network to its files.
    """
    inference, unlabelled, postponed = settings.inference, list[str](), list[DecodedSample]()

    def missing() -> Iterator[DecodedSample]:
        for sample in samples:
            if mask_folder.is_made(out, sample.name, inference.soft):
                continue
            if inference.restrict_to_labels and not sample.classes:
                unlabelled.append(sample.name)
            yield sample

    def unfinished(sample: DecodedSample) -> Unfinished:
        found = likely_classes(predictor, sample, settings)
        return Unfinished(replace(sample, mask=None), found, predictor.num_classes, settings, out)

    def beside_others(sample: DecodedSample) -> Unfinished | None:
        try:
            return unfinished(sample)
        except ImageTooLargeError:
            postponed.append(sample)
            return None

    if predictor.device.type == "cpu" and workers.processes > 1:
        made = map_in_threads(lambda sample: workers.run(finish, unfinished(sample)), workers.processes, missing())
    elif predictor.device.type == "cpu":
        made = workers.map(finish, map(unfinished, missing()))
    else:
        several = filter(None, map_in_threads(beside_others, ON_A_GPU, missing()))
        made = workers.map(finish, chain(several, map(unfinished, postponed)))  # those that need the GPU alone come last
    for quality in made:
        curves.add(quality)
    if unlabelled:
        some = ", ".join(unlabelled[:10]) + (", ..." if len(unlabelled) > 10 else "")
        _log.warning("%d images have no label, so their masks are only background: %s", len(unlabelled), some)


def write_part(
    load_predictor: Callable[[int], Predictor],
    settings: MaskSettings,
    index: Index,
    part: str | None,
    weights: Path,
    out: Path,
    tensorboard: Path,
) -> Curves | None:
    """Write the masks of the shards `part` ("A:B", None: all) of a set into `out`; existing masks are left unchanged.

    Returns the counts of the masks that it wrote, None where none was missing.

    load_predictor: takes the number of images and returns the network with the weights in the file `weights`; called only if a
    mask is missing. tensorboard: folder of the curves. Raises UserError when `out` holds other masks or when the weights give NaN
    or infinite values.
    """
    entries = select_shards(index, part)
    mask_folder.open_for_writing(out, settings, weights)
    mask_folder.remove_unfinished(out, entries)
    missing = mask_folder.missing(out, entries, settings.inference.soft)
    if not missing:
        return None
    predictor = load_predictor(len(missing))
    samples = StoredSamples(index, missing, settings.workers)
    board = tensorboard / out.name / ("" if part is None else f"shards-{part.replace(':', '-')}")
    curves = Curves(board, len(entries) - len(missing))
    try:
        with WorkerPool(settings.inference.processes) as workers:
            write_masks(predictor, settings, tqdm(samples, "masks", unit=" images", disable=None), out, curves, workers)
    except NotFiniteError as error:
        raise NotFiniteError(f"{weights}: {error}") from None
    finally:
        _log.info(curves.close())
    return curves
