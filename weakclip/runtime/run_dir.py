"""The run directory: everything of a run that survives a job lies in it.

runs/NAME/  config.yaml  data.json  checkpoints/step-N.safetensors  weights/{best,last}.safetensors  best.json
            classify/  pseudo/  retrain/NETWORK/  scores/  scores-masks.json  tensorboard/  metrics.jsonl  lock.json  jobs/
            scores.json (of the demo)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from weakclip import config as configs
from weakclip.config import Config, ConfigError
from weakclip.runtime.atomic import write_whole

SCORES = "scores.json"
"""In a run directory: {name: mIoU in percent}, which a run writes last."""


def claim(config: Config, fixed: Sequence[str], resume: bool) -> Path:
    """The run directory, with the resolved config in it. fixed: as of `check_same`.

    Raises ConfigError when it holds another run's files: anything at all unless `resume`, a run with other settings if so.
    """
    run = Path(config.run)
    if run.exists() and not run.is_dir():
        raise ConfigError(f"run: {run} is a file")
    written = run / "config.yaml"
    if run.is_dir() and any(not _may_come_first(path) for path in run.iterdir()):
        if not written.is_file():
            raise ConfigError(f"run: {run} holds files that are no run's; set run to another directory")
        if not resume:
            raise ConfigError(f"run: {run} already holds a run; go on with it by --resume auto, or set run to another directory")
        check_same(config, fixed)
    run.mkdir(parents=True, exist_ok=True)
    configs.save(config, written)
    return run


def _may_come_first(path: Path) -> bool:
    """CAMs may be made, and scored, sweeps begun, jobs submitted and a classifier trained before there is a run."""
    return path.name in ("sweeps", "jobs", "scores", "classify", "shards") or path.name.startswith("scores-")


def check_same(config: Config, fixed: Sequence[str]) -> None:
    """Raises ConfigError when the run directory holds a run that was begun with other settings.

    fixed: the keys that must be the same, beside the data and their order.
    """
    written = Path(config.run) / "config.yaml"
    if not written.is_file():
        return
    earlier, now = configs.load(written), config
    changed = [key for key in (*fixed, "data.train", "data.mix") if attrgetter(key)(earlier) != attrgetter(key)(now)]
    if changed:
        raise ConfigError(
            f"run: {config.run} was made with another {', '.join(changed)}; set it as in {written}, or set run anew"
        )


def claim_data(run: Path, fingerprints: Sequence[str]) -> None:
    """Note which training sets the run is of (Index.fingerprint): other shards would come in another order.

    Raises ConfigError when it began with others, be it under the same path.
    """
    note = run / "data.json"
    if note.is_file() and json.loads(note.read_text()) != list(fingerprints):
        raise ConfigError(f"run: the shards of data.train or data.mix are not those that {run} began with; set run anew")
    write_whole(note, json.dumps(fingerprints) + "\n")


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*.safetensors") if path.stem.removeprefix("step-").isdigit()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(path.stem.removeprefix("step-"))
