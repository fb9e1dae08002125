"""The settings that DeepSpeed gets: the file `train.deepspeed`, checked by DeepSpeed's own rules, and those of the recipe.

DeepSpeed ignores unknown keys outside of its pydantic models, and values of a wrong type. So it is given a mapping that notes
which keys it asks for and with which default: what it never asks for is unknown to it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from weakclip.config import ConfigError, OptimConfig, TrainConfig
from weakclip.training import deepspeed_file
from weakclip.training.world import deepspeed

FOR_TORCHS_OPTIMIZERS = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
"""What DeepSpeed needs to accept an optimizer of torch, also where ZeRO offloads its state."""

WITHOUT_EFFECT = (
    "autotuning", "checkpoint", "data_efficiency", "dataloader_drop_last", "expert_parallel", "hybrid_engine", "pipeline",
    "tensor_parallel", "weight_quantization",
)  # fmt: skip
"""Keys for what this training does not use: DeepSpeed's data loader, checkpoints, tuner, inference and parts of a model."""

NO_DEFAULT = {"steps_per_print": 1}
"""Values of the right type, for keys whose default None does not tell it."""


def deepspeed_settings(train: TrainConfig, optim: OptimConfig, prefix: str = "") -> dict[str, Any]:
    """Return DeepSpeed's settings: the file `train.deepspeed`, completed with those of the recipe. prefix: Job.prefix.

    Raises ConfigError as `deepspeed_file.read` does, and for a key or value that DeepSpeed does not know, or that does not work
    in this training.
    """
    ours = {
        "train_micro_batch_size_per_gpu": train.batch,
        "gradient_accumulation_steps": train.accumulate,
        "gradient_clipping": optim.clip_grad,
    }
    found = deepspeed_file.read(train, prefix)
    try:
        _check(found, FOR_TORCHS_OPTIMIZERS | found | ours)
    except _Refused as error:
        raise ConfigError(f"{prefix}train.deepspeed: {train.deepspeed}: {error}") from None
    return FOR_TORCHS_OPTIMIZERS | found | ours


class _Refused(Exception):
    """A setting is wrong. The message names the key."""


class _Asked(dict[str, Any]):
    """A mapping that notes which keys it is asked for, with their defaults, the last one at the end; so do the mappings in it."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__({key: _Asked(value) if isinstance(value, dict) else value for key, value in content.items()})
        self.asked: dict[str, Any] = {}

    def _note(self, key: str, default: Any = None) -> None:
        earlier = self.asked.pop(key, None)
        self.asked[key] = earlier if default is None else default

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # where this is defined, f(**mapping) asks for each key

    def __contains__(self, key: object) -> bool:
        self._note(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key, default)
        return super().get(key, default)


def _check(found: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise _Refused for what DeepSpeed would refuse, ignore or misread in the content `found` of the file."""
    noted = _Asked(settings)
    try:
        parsed = deepspeed.runtime.config.DeepSpeedConfig(noted)
    except ValidationError as error:
        raise _Refused(_in_a_model(error, noted)) from None
    except Exception as error:  # what it raises for a value of the wrong type depends on the first line that uses it
        _check_types(noted)
        key, message = [*noted.asked][-1], " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, (TypeError, AttributeError)) and key in found:
            message = f"{found[key]!r:.40} is of the wrong type"
        raise _Refused(f"{key}: {message}" if key in found and key not in message else message) from None
    _check_types(noted)
    _check_names(noted)
    if idle := next((key for key in WITHOUT_EFFECT if key in found), None):
        raise _Refused(f"{idle}: it has no effect in this training; leave it out")
    for key, value in FOR_TORCHS_OPTIMIZERS.items():
        if settings[key] != value:
            raise _Refused(f'{key}: set "{key}": {str(value).lower()}, or leave it out: the optimizers are those of torch')
    for key, why in _unusable(parsed.zero_config):
        raise _Refused(f"zero_optimization.{key}: {why}")


def _check_types(noted: _Asked, where: str = "") -> None:
    """Raise _Refused for a value that has not the type of its default."""
    for key, value in noted.items():
        default = NO_DEFAULT.get(key, noted.asked.get(key))
        if default is not None and _kind(value) != _kind(default):
            raise _Refused(f"{where}{key}: {value!r:.40} is not {_kind(default)}")
        if isinstance(value, _Asked):
            _check_types(value, f"{where}{key}.")


def _check_names(noted: _Asked, where: str = "") -> None:
    """Raise _Refused for a key that DeepSpeed did not ask for."""
    for key, value in noted.items():
        if key not in noted.asked:
            raise _Refused(_unknown(f"{where}{key}", key, noted.asked))
        if isinstance(value, _Asked) and value.asked:  # else a pydantic model has taken it as a whole
            _check_names(value, f"{where}{key}.")


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", dict: "a mapping", list: "a list"}
    return next((name for kind, name in kinds.items() if isinstance(value, kind)), type(value).__name__)


def _unknown(path: str, key: str, known: Iterable[str]) -> str:
    return f"unknown key {path!r}; the nearest is {difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]!r}"


def _in_a_model(error: ValidationError, noted: _Asked) -> str:
    """Return what is wrong in a section that DeepSpeed reads by a pydantic model. The last key that it asked for is the section,
    or it read several sections by one model."""
    first = error.errors()[0]
    names = [str(name) for name in first["loc"]]
    section = [] if names and names[0] in [*noted] else [[*noted.asked][-1]]
    path = ".".join([*section, *names])
    if first["type"] == "extra_forbidden":
        return _unknown(path, names[-1], _fields(error.title, names[:-1]))
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{path}: {message}" + (f", is {first['input']!r:.40}" if names else "")


def _fields(model: str, path: Iterable[str]) -> list[str]:
    """Return the keys of a pydantic model of DeepSpeed, given by its name, or of the model at `path` in it."""
    found = next(kind for kind in _models(deepspeed.runtime.config_utils.DeepSpeedConfigModel) if kind.__name__ == model)
    for name in path:
        kind = next(field.annotation for own, field in found.model_fields.items() if name in (own, field.alias))
        found = next(each for each in (kind, *get_args(kind)) if isinstance(each, type) and issubclass(each, BaseModel))
    return [field.alias or name for name, field in found.model_fields.items()]


def _models(base: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield base
    for kind in base.__subclasses__():
        yield from _models(kind)


def _unusable(zero: Any) -> Iterator[tuple[str, str]]:
    """Yield keys of `zero_optimization` that DeepSpeed accepts, but that would have no effect or cannot work here, and why."""
    optimizer, parameters = zero.offload_optimizer, zero.offload_param
    for name, section in (("offload_optimizer", optimizer), ("offload_param", parameters)):
        if section and section.device == "nvme":
            yield f"{name}.device", 'nvme is not supported; use "cpu"'
    if optimizer and optimizer.device != "none" and zero.stage == 0:
        yield "offload_optimizer", "it has no effect at stage 0; set stage to 1, 2 or 3"
    if parameters and parameters.device != "none" and zero.stage != 3:
        yield "offload_param", f"it has no effect at stage {int(zero.stage)}; set stage to 3, or use offload_optimizer"
    own = "it works only with DeepSpeed's own optimizers; leave it out"
    if optimizer and optimizer.ratio < 1:
        yield "offload_optimizer.ratio", own
    if getattr(optimizer, "super_offload", False):  # which some versions of DeepSpeed lack, as they do the next two
        yield "offload_optimizer.super_offload", own
    if getattr(zero, "zenflow", None):
        yield "zenflow", own
    if not getattr(zero, "compute_grad_norm", True):
        yield "compute_grad_norm", "the norm is logged at each step; leave it out"
