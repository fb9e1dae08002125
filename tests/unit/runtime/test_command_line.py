"""Command lines: one line for a user error, a traceback for a bug, and verbosity."""

from __future__ import annotations

import pytest

from weakclip import cli, evaluate, parameters, pseudo
from weakclip.config import ConfigError
from weakclip.runtime.errors import UserError


def one_line(capsys, main, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        cli.run(main, arguments)
    out, error = capsys.readouterr()
    assert exit.value.code == 1 and out == ""
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("main", [parameters.main, pseudo.main, evaluate.main], ids=lambda main: main.__module__)
def test_a_users_mistake_is_one_line_and_exit_code_1(capsys, main, tiny_recipe, tmp_path):
    recipe = str(tiny_recipe)
    assert "no such config file" in one_line(capsys, main, "--config", str(tmp_path / "none.yaml"))
    assert "unknown key 'train.bacth'" in one_line(capsys, main, "--config", recipe, "train.bacth=1")
    (tmp_path / "some.safetensors").touch()
    weights = ["--weights", str(tmp_path / "some.safetensors")] if main is pseudo.main else []
    assert "neither voc" in one_line(capsys, main, "--config", recipe, "classes=cocoa", *weights)


def test_errors_of_the_system_are_one_line_too_and_others_are_not_hidden(capsys):
    def fail(error: BaseException):
        def main(_arguments) -> None:
            raise error

        return main

    assert one_line(capsys, fail(OSError(28, "Disk full", "mask.png"))) == "error: mask.png: disk full\n"
    assert "wrong" in one_line(capsys, fail(UserError("wrong")))
    for bug in (TypeError("a bug"), ValueError("operands could not be broadcast"), OSError("names no file")):
        with pytest.raises(type(bug)):
            cli.run(fail(bug), [])
    with pytest.raises(SystemExit, match="130"):
        cli.run(fail(KeyboardInterrupt()), [])


def test_the_traceback_is_shown_on_request(monkeypatch):
    monkeypatch.setenv("WEAKCLIP_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        cli.run(parameters.main, ["--config", "nowhere.yaml"])


def test_overrides_and_options_may_come_in_any_order(tiny_recipe):
    for arguments in (["--config", str(tiny_recipe), "seed=3", "--flag"], ["seed=3", "--flag", "--config", str(tiny_recipe)]):
        parser = cli.Parser()
        parser.add_argument("--flag", action="store_true")
        config, options = cli.parse_config(parser, arguments)
        assert config.seed == 3 and options.flag
