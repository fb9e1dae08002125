"""Regions: when they are compiled, and what a failed compilation does. Real compilation is an integration test."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from weakclip.runtime import compilation


@pytest.fixture
def compiled(monkeypatch):
    """Switches compilation on, with a compiler that notes its calls instead."""
    calls = []

    def compiler(function, **_options):
        def run(*args):
            calls.append(function.__name__)
            return function(*args)

        return run

    monkeypatch.setattr(torch, "compile", compiler)
    compilation.switch(True)
    yield calls
    compilation.switch(False)


def make_region():
    @compilation.region
    def double(x):
        """Return twice x."""
        return 2 * x

    return double


def test_a_region_keeps_its_name_and_runs_as_written_by_default(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    double = make_region()
    assert double(torch.tensor(2)) == 4 and double.__name__ == "double" and double.__doc__ == "Return twice x."


def test_it_is_compiled_where_gradients_are_enabled(compiled):
    double = make_region()
    with torch.no_grad():
        assert double(torch.tensor(2)) == 4
    with compilation.paused():
        assert double(torch.tensor(2)) == 4
    assert not compiled
    assert double(torch.tensor(2)) == 4 and compiled == ["double"]


def test_inference_compiles_it_where_all_inputs_have_one_shape(compiled):
    double = make_region()
    compilation.switch(False)
    with torch.inference_mode():
        assert double(torch.tensor(2)) == 4 and not compiled
        with compilation.in_turn(one_shape=True):
            assert double(torch.tensor(2)) == 4 and compiled == ["double"]


def test_a_failed_compilation_is_one_warning_and_eager_mode(compiled, monkeypatch, caplog):
    def failing(_function, **_options):
        def run(*_args):
            compiled.append("tried")
            raise TorchDynamoException("no\ncompiler\n\nand much more")

        return run

    monkeypatch.setattr(torch, "compile", failing)
    double = make_region()
    assert [double(torch.tensor(number)).item() for number in (2, 3, 4)] == [4, 6, 8]
    assert compiled == ["tried"]
    [message] = caplog.messages
    assert message.endswith("double could not be compiled and runs in eager mode: no compiler")


def test_errors_of_the_function_pass_through(compiled):
    with pytest.raises(RuntimeError, match="size of tensor"):
        compilation.region(torch.add)(torch.zeros(2), torch.zeros(3))
