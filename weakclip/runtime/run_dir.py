"""The run directory: the path of every file of a run that outlives a job is defined here, and nowhere else.

runs/NAME/  config.yaml  data.json  checkpoints/step-N.safetensors  weights/{best,last}.safetensors  best.json
            classify/  pseudo/  retrain/NETWORK/  scores/  scores-WHAT.json  tensorboard/  metrics.jsonl  lock.json  jobs/
            logs/rank-N.log  sweeps/  scores.json (written last by a demo run)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from weakclip.runtime.errors import UserError

_RETRAIN = "retrain"

ON_SEEDS = "-seeds"
"""Suffix of the directory of a network that is retrained on the seeds instead of the pseudo masks."""


@dataclass(frozen=True)
class RunDir:
    """Paths in one run directory. Nothing here creates or checks a file, except for the methods that say so."""

    root: Path

    def __str__(self) -> str:
        return str(self.root)

    @classmethod
    def existing(cls, root: str | Path) -> RunDir:
        """Return the run directory `root`. Raises UserError where none is."""
        run = cls(Path(root))
        if not run.config.is_file():
            raise UserError(f"{run}: not a run directory, for it has no {run.config.name}")
        return run

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.root / "config.yaml"

    @property
    def data(self) -> Path:
        """Fingerprints of the shard sets that the run was started with."""
        return self.root / "data.json"

    @property
    def metrics(self) -> Path:
        """Metrics: one JSON object per line, every `train.log_every` steps."""
        return self.root / "metrics.jsonl"

    def log(self, rank: int) -> Path:
        """Return the log file of a rank of the training."""
        return self.root / "logs" / f"rank-{rank}.log"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's curves."""
        return self.root / "tensorboard"

    @property
    def lock(self) -> Path:
        """The lock file, which names the process that works on the run."""
        return self.root / "lock.json"

    @property
    def jobs(self) -> Path:
        """Folder of the submitted jobs: program, recipe, batch scripts and logs of each."""
        return self.root / "jobs"

    @property
    def best(self) -> Path:
        """Step and mIoU of the best weights."""
        return self.root / "best.json"

    @property
    def final_scores(self) -> Path:
        """{name: mIoU in percent}, the last file that a demo run writes."""
        return self.root / "scores.json"

    @property
    def sweeps(self) -> Path:
        """Folder of the sweeps whose results the report of this run shows."""
        return self.root / "sweeps"

    # -------------------------------------------------------------------------------------------- weights and checkpoints

    def weights(self, name: str) -> Path:
        """Return the file with the trainable part of the network. name: best or last."""
        return self.root / "weights" / f"{name}.safetensors"

    def best_weights(self) -> Path | None:
        """Return the weights with the best validation score, or without validation the last ones; None if neither file exists."""
        return next((path for path in (self.weights("best"), self.weights("last")) if path.is_file()), None)

    def find_weights(self, choice: str) -> Path:
        """Return the file that `choice` names: "best" or "last" of the run, or a path. Without validation, best is last.

        Raises UserError when it does not exist.
        """
        candidates = {"best": self.best_weights(), "last": self.weights("last")}
        path = candidates[choice] if choice in candidates else Path(choice)
        if path is None or not path.is_file():
            missing = path or self.weights("last")
            raise UserError(f"--weights {choice}: {missing} does not exist; train first, or set run to a run that has weights")
        return path

    def checkpoint(self, step: int) -> Path:
        """Return the checkpoint of a step, from which --resume auto resumes on any number of ranks."""
        return self.root / "checkpoints" / f"step-{step}.safetensors"

    def checkpoints(self) -> list[Path]:
        """List the complete checkpoints, oldest first."""
        found = (self.root / "checkpoints").glob("step-*.safetensors")
        return sorted((path for path in found if path.stem.removeprefix("step-").isdigit()), key=checkpoint_step)

    # ------------------------------------------------------------------------------------------------- masks and scores

    @property
    def pseudo(self) -> Path:
        """Folder of the pseudo masks."""
        return self.root / "pseudo"

    def masks(self, split: str) -> Path:
        """Return the folder of the masks that a retrained network predicts for a split."""
        return self.root / f"masks-{split}"

    def scores(self, what: str) -> Path:
        """Return the file with the scores of `what`: masks, seeds, cam, cam_crf or a split."""
        return self.root / f"scores-{what}.json"

    @property
    def pseudo_counts(self) -> Path:
        """Folder of the counts per shard from which the scores of the pseudo masks are computed."""
        return self.root / "scores"

    def split_counts(self, split: str) -> Path:
        """Return the folder of the counts per shard from which the scores of a split's predicted masks are computed."""
        return self.root / f"counts-{split}"

    # --------------------------------------------------------------------------------------------------- runs in a run

    @property
    def classifier(self) -> RunDir:
        """Run directory of the classifier that makes CAMs."""
        return RunDir(self.root / "classify")

    def is_retrained(self, network: str | None) -> bool:
        """Return whether this is where `network` of the run's recipe is trained on the pseudo masks of the run above it."""
        root = self.root.resolve()
        return network is not None and root.parent.name == _RETRAIN and root.name.removesuffix(ON_SEEDS) == network

    def retrained(self, network: str, on_seeds: bool = False) -> RunDir:
        """Return the run directory of a network that is trained on the pseudo masks, or with `on_seeds` on the seeds."""
        return RunDir(self.root / _RETRAIN / f"{network}{ON_SEEDS if on_seeds else ''}")


def checkpoint_step(path: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(path.stem.removeprefix("step-"))
