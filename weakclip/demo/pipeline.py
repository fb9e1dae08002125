"""The whole pipeline on the synthetic world: images -> shards -> CAMs -> training -> pseudo masks -> scores."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from PIL import Image

from weakclip import labels, pseudo
from weakclip.cams import make
from weakclip.config import Config, CrfConfig
from weakclip.data.codecs import encode_mask_png
from weakclip.data.index import Index, open_index
from weakclip.data.sample import DecodedSample, Sample
from weakclip.data.stream import StoredSamples
from weakclip.datasets.writing import build_shards
from weakclip.demo import world
from weakclip.demo.baselines import Baselines
from weakclip.evaluation import visualize
from weakclip.evaluation.scoring import count, score, truth
from weakclip.masks import mask_folder
from weakclip.masks.seeds import cam_maps
from weakclip.runtime.atomic import write_whole
from weakclip.runtime.tables import Table, spread
from weakclip.training import jobs
from weakclip.training.claim import claim
from weakclip.training.data import TrainingData
from weakclip.training.loop import train
from weakclip.training.world import World

_log = logging.getLogger(__name__)

SWEEP = Path(__file__).parents[1] / "assets" / "demo_seeds.json"
"""Scores of the runs of configs/sweeps/seeds.yaml, by: python -m weakclip.sweep configs/sweeps/seeds.yaml --json FILE"""

UNSEEN = 500_000
"""Index of the first image that no training step sees."""

ROWS = {
    "cam": "CAM, best single threshold",
    "cam_crf": "CAM + dense CRF, best setting",
    "weakclip": "WeakCLIP",
    "weakclip_crf": "WeakCLIP + dense CRF",
    "ceiling": "WeakCLIP trained on exact masks",
    "ceiling_crf": "WeakCLIP trained on exact masks + dense CRF",
    "unseen_weakclip": "WeakCLIP, unseen images",
    "unseen_weakclip_crf": "WeakCLIP + dense CRF, unseen images",
    "unseen_ceiling": "WeakCLIP trained on exact masks, unseen images",
    "unseen_ceiling_crf": "WeakCLIP trained on exact masks + dense CRF, unseen images",
}


class Stages:
    """Names each stage as it starts. `minutes` holds how long each took."""

    def __init__(self) -> None:
        self.minutes: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        _log.info(name)
        start = time.monotonic()
        yield
        self.minutes[name] = (time.monotonic() - start) / 60


def run(config: Config, stage: Stages) -> dict[str, float]:
    """Run the whole pipeline in the run directory, and return mIoU (%) by name. An interrupted run resumes."""
    if config.demo.seeds == "exact":  # the seeds are the exact masks, drawn with the images
        config = replace(config, seeds=replace(config.seeds, crf=None))
    job = jobs.refine(config)
    claim(job, resume=True)
    folder = job.run.root
    with stage("images of the synthetic world"):
        unseen = draw_shards(config)
    with stage("making CAMs from labels with the frozen CLIP"):
        make.run(config, part=None)
    seen = open_index(config.data.train, job.names)
    with stage(f"training WeakCLIP, {config.train.steps} steps"):
        train(job, TrainingData.open(job), World.join(), resume=True)
    with stage("scoring the CAMs"):
        baselines = Baselines.of(_samples(config, seen), seen, crf_settings(config), config.pseudo.processes)
    scores = {"cam": baselines.cam, "cam_crf": baselines.cam_crf}
    name = "ceiling" if config.demo.seeds == "exact" else "weakclip"
    for index, row in ((seen, name), (unseen, f"unseen_{name}")):
        with stage(f"pseudo masks: {ROWS[row]}"):
            scores |= mask_scores(config, index, folder / "masks", row)
    rounded = {name: round(value, 2) for name, value in scores.items()}
    write_whole(job.run.final_scores, json.dumps(rounded, indent=1) + "\n")
    draw(config, seen, baselines, folder / "masks" / name).save(folder / "pictures.png")
    return scores


def mask_scores(config: Config, index: Index, folder: Path, row: str) -> dict[str, float]:
    """Write the last weights' masks of a shard set without and with the CRF, to `row` and `row`_crf. Returns mIoU (%)."""
    plain, refined = folder / row, folder / f"{row}_crf"
    settings = replace(config, pseudo=replace(config.pseudo, crf=crf_settings(config), soft=True))
    pseudo.run(settings, str(index.root), config.run_dir.find_weights("last"), refined)
    plain.mkdir(exist_ok=True)
    for entry in index.entries:
        mask_folder.save(mask_folder.read_soft(refined, entry.name), mask_folder.mask_path(plain, entry.name))

    def miou(out: Path) -> float:
        return 100 * score(_samples(config, index), lambda sample: mask_folder.read(out, sample.name), index.classes).miou

    return {row: miou(plain), f"{row}_crf": miou(refined)}


def crf_settings(config: Config) -> CrfConfig:
    return config.pseudo.crf or CrfConfig()


def table(scores: dict[str, float]) -> Table:
    """Return a run's scores beside mean and std over several seeds of the shipped recipe."""
    seeds: dict[str, dict[str, float]] = {}
    for task, found in json.loads(SWEEP.read_text()).items():  # such as all/0 and exact-masks/0
        seeds.setdefault(task.rpartition("/")[2], {}).update(found)
    rows = [
        (ROWS[name], value, spread([seed[name] for seed in seeds.values() if name in seed])) for name, value in scores.items()
    ]
    return Table("", ("mIoU against the exact masks", "%", f"{len(seeds)} seeds"), rows)


def draw_shards(config: Config) -> Index:
    """Write labelled training images to `data.labelled`, and as many unseen ones to `data.val`. Returns the latter set."""
    names, demo = labels.class_names(config.classes), config.demo

    def training_sample(index: int) -> Sample:
        sample = shard_sample(f"train_{index:05d}", world.picture(demo.seed, index))
        return replace(sample, seed=sample.mask) if demo.seeds == "exact" else sample

    def unseen_sample(index: int) -> Sample:
        return shard_sample(f"unseen_{index:05d}", world.picture(demo.seed, UNSEEN + index))

    for out, load in ((config.data.labelled, training_sample), (config.data.val, unseen_sample)):
        path = Path(str(out))
        if not (path / "index.json").is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            build_shards(range(demo.size), load, path, names, samples_per_shard=64)
    return open_index(str(config.data.val), names)


def shard_sample(key: str, picture: world.Picture) -> Sample:
    buffer = io.BytesIO()
    Image.fromarray(picture.image).save(buffer, "JPEG", quality=95)
    H, W = picture.mask.shape
    return Sample(key, buffer.getvalue(), "jpg", picture.classes, H, W, "demo world", mask=encode_mask_png(picture.mask))


def _samples(config: Config, index: Index) -> Iterable[DecodedSample]:
    return StoredSamples(index, index.entries, config.data.workers)


def draw(config: Config, index: Index, baselines: Baselines, made: Path, each: int = 4) -> Image.Image:
    """Draw the `each` worst, median and best images of WeakCLIP's masks in `made`, beside the CAM and the CAM with a CRF."""
    scored = sorted((_own_score(sample, made), number) for number, sample in enumerate(_samples(config, index)))
    middle = (len(scored) - each) // 2
    chosen = dict.fromkeys([*scored[:each], *scored[middle : middle + each], *scored[-each:]])
    rows = []
    for miou, number in chosen:
        sample = next(iter(StoredSamples(index, index.entries[number : number + 1], workers=0)))
        refined = mask_folder.read(made.with_name(f"{made.name}_crf"), sample.name)
        coloured = [baselines.refined(sample), mask_folder.read(made, sample.name), refined, truth(sample)]
        found = [sample.image, visualize.heat(sample.image, cam_maps(sample)), *map(visualize.colour_mask, coloured)]
        rows.append(visualize.Row(f"{sample.name}  {miou:.0f} %", sample.classes, found))
    return visualize.sheet(rows, index.classes, ("image", "CAM", "CAM + CRF", "WeakCLIP", "WeakCLIP + CRF", "exact mask"))


def _own_score(sample: DecodedSample, made: Path) -> float:
    """Return the mIoU (%) of one image's mask over the classes in its true or predicted mask."""
    return 100 * count([sample], lambda sample: mask_folder.read(made, sample.name), len(labels.DEMO)).scores(labels.DEMO).miou
