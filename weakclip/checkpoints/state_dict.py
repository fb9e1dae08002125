"""Checking whether tensors fit a model. One line names missing keys, unexpected keys, shape mismatches and what is not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from weakclip.config import ConfigError

NAMED = 10
"""Number of names that are listed; the others are only counted."""


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], where: str, hint: str) -> None:
    """Load `tensors` as the module's complete state dict, converted to its dtypes. Raises ConfigError as `check_fit` does."""
    check_fit(module.state_dict(), tensors, where, hint)
    module.load_state_dict(tensors)


def check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str, hint: str) -> None:
    """Raise ConfigError unless both have the same names and shapes, and `found` is finite. It names `where`.

    hint: how to mend names and shapes, with which their message ends.
    """
    missing = [name for name in expected if name not in found]
    further = [name for name in found if name not in expected]
    reshaped = [
        f"{name} is {list(found[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    faults = (("missing keys", missing), ("unexpected keys", further), ("shape mismatch", reshaped))
    if said := "; ".join(f"{what} ({len(names)}): {some(names)}" for what, names in faults if names):
        raise ConfigError(f"{where}: does not fit; {said}; {hint}")
    if broken := [name for name, tensor in found.items() if not tensor.is_meta and not tensor.isfinite().all()]:
        raise ConfigError(f"{where}: NaN or infinity in {some(broken)}; its training diverged, so take earlier weights")


def some(names: Sequence[str]) -> str:
    """Return the first ten names, joined by commas, and the number of the others."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
