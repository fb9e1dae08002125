"""Compilation of the costly parts of a network and its losses, region by region.

A region is a function or a method marked with `@region`. By default compilation is off, and a region runs as it is written.
Regions are small because whole steps don't compile everywhere: a failure costs one region, not the run.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._functorch import config as functorch_config

P = ParamSpec("P")
R = TypeVar("R")

_log = logging.getLogger(__name__)
_on = False
_in_one_shape = ContextVar("in_one_shape", default=False)
_inference = threading.Lock()


def switch(on: bool) -> None:
    """Compile regions in training, where gradients are enabled, from now on, or stop doing so."""
    global _on
    _on = on


def is_on() -> bool:
    """Return whether regions are compiled in training."""
    return _on


@contextmanager
def in_turn(one_shape: bool) -> Iterator[None]:
    """Let threads run a network one after the other, because torch.compile is not made for several at a time.

    one_shape: compile regions inside, also without gradients. All such inputs must have one shape: each shape is compiled anew.
    """
    with _inference:
        token = _in_one_shape.set(one_shape)
        try:
            yield
        finally:
            _in_one_shape.reset(token)


@contextmanager
def paused() -> Iterator[None]:
    """Run training regions as they are written inside."""
    before = _on
    switch(False)
    try:
        yield
    finally:
        switch(before)


def region(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function or method that is compiled in training, after `switch`, and in inference within `in_turn`.

    Random numbers are those of eager mode. A failed compilation is one warning, and the region then runs as it is written.
    Compiled code is kept in the user's cache directory for the next process.
    """
    compiled: Callable[P, R] | None = None
    failed = False

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal compiled, failed
        if failed or not (_in_one_shape.get() or (_on and torch.is_grad_enabled())):
            return function(*args, **kwargs)
        if compiled is None:
            _configure()
            options: dict[str, Any] = {"fallback_random": True}
            compiled = torch.compile(function, dynamic=False, options=options)
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            failed = True
            reason = " ".join(str(error).split("\n\n")[0].split())
            _log.warning("%s could not be compiled and runs in eager mode: %s", function.__qualname__, reason)
            return function(*args, **kwargs)

    return call


def _configure() -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "weakclip" / "compiled"))
    if hasattr(functorch_config, "force_non_lazy_backward_lowering"):  # so that a failure shows in the forward pass
        functorch_config.force_non_lazy_backward_lowering = True
