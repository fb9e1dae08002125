"""The JSON file `train.deepspeed`, as far as it can be checked before DeepSpeed and torch are loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weakclip.config import ConfigError, TrainConfig

IN_THE_RECIPE = {
    "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.batch",
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_clipping": "optim.clip_grad",
    "optimizer": "optim.optimizer",
    "scheduler": "optim.schedule",
    "bf16": "precision",
    "fp16": "precision",
    "torch_autocast": "precision",
}
"""DeepSpeed's keys that must not be in the file -> what the recipe calls them."""


def read(train: TrainConfig, prefix: str = "") -> dict[str, Any]:
    """Return the content of the file `train.deepspeed`. prefix: Job.prefix, for messages.

    Raises ConfigError when the file is missing, is not JSON, has a key twice, names no ZeRO stage, or sets a key that the recipe
    sets.
    """
    path = Path(train.deepspeed)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise ConfigError(
            f"{prefix}train.deepspeed: {path} cannot be read ({error.strerror}); such files are in configs/deepspeed"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{prefix}train.deepspeed: {path} is not valid JSON: {error}") from None
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    if not isinstance(zero, dict) or "stage" not in zero:
        example = '{"zero_optimization": {"stage": 1}}'
        raise ConfigError(f"{prefix}train.deepspeed: {path} does not set zero_optimization.stage, as in {example}")
    if taken := next((key for key in IN_THE_RECIPE if key in settings), None):
        own = IN_THE_RECIPE[taken] if IN_THE_RECIPE[taken] == "precision" else f"{prefix}{IN_THE_RECIPE[taken]}"
        raise ConfigError(f"{prefix}train.deepspeed: {path}: {taken}: leave it out, and set {own} in the recipe")
    return settings


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is set twice")
        found[key] = value
    return found
