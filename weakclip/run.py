"""The run directory: everything of a run that survives a job lies in it.

runs/NAME/  config.yaml  checkpoints/step-N/  weights/{best,last}.safetensors  best.json  pseudo/  scores.json  tensorboard/
            metrics.jsonl
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from weakclip import config as configs
from weakclip.config import Config, ConfigError

# What a resumed run must share with the one it goes on with: the model, the data and their order.
_FIXED = ("seed", "classes", "seeds", "augment", "clip", "prompts", "adapter", "matching", "decoder", "loss", "demo")


def claim(config: Config, resume: bool) -> Path:
    """The run directory, with the resolved config in it.

    Raises ConfigError when it holds another run's files: anything at all unless `resume`, a run with other settings if so.
    """
    run = Path(config.run)
    if run.exists() and not run.is_dir():
        raise ConfigError(f"run: {run} is a file")
    written = run / "config.yaml"
    # Seeds and CAMs may be scored, and sweeps begun, before there is a run.
    if run.is_dir() and any(path.name != "sweeps" and not path.name.startswith("scores-") for path in run.iterdir()):
        if not written.is_file():
            raise ConfigError(f"run: {run} holds files that are no run's; set run to another directory")
        if not resume:
            raise ConfigError(f"run: {run} already holds a run; go on with it by --resume auto, or set run to another directory")
        earlier, now = asdict(configs.load(written)), asdict(config)
        changed = [f"{key}" for key in _FIXED if earlier[key] != now[key]]
        changed += ["data.train"] if earlier["data"]["train"] != now["data"]["train"] else []
        if changed:
            raise ConfigError(f"run: {run} was made with another {', '.join(changed)}; set it as in {written}, or set run anew")
    run.mkdir(parents=True, exist_ok=True)
    configs.save(config, written)
    return run
