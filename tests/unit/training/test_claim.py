"""The run directory's rules, and the command lines' one-line errors."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys

import pytest

from weakclip import cli, evaluate, pseudo
from weakclip.config import ConfigError, load
from weakclip.models import weakclip
from weakclip.runtime import run_dir as runs
from weakclip.runtime.run_dir import claim_data
from weakclip.training.jobs import Refine


def claim(config, resume):
    return runs.claim(config, Refine.fixed, resume)


def test_a_new_run_is_made_with_its_resolved_config(tiny_config, tmp_path):
    config = tiny_config("run=" + str(tmp_path / "a/b"))
    assert claim(config, resume=False) == tmp_path / "a/b"
    assert load(tmp_path / "a/b/config.yaml") == config


def test_an_empty_directory_is_taken_and_resume_begins_where_there_is_nothing(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    claim(tiny_config(), resume=True)
    assert (tmp_path / "run/config.yaml").is_file()


def test_a_run_is_not_begun_twice(tiny_config):
    claim(tiny_config(), resume=False)
    with pytest.raises(ConfigError, match="already holds a run; go on with it by --resume auto, or set run"):
        claim(tiny_config(), resume=False)


def test_files_of_something_else_are_left_alone(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").touch()
    for resume in (False, True):
        with pytest.raises(ConfigError, match="holds files that are no run's; set run"):
            claim(tiny_config(), resume)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("earlier", ["scores-seeds.json", "shards/train/index.json"])
def test_cams_may_be_made_and_scored_in_the_folder_before_the_run(tiny_config, tmp_path, earlier):
    (tmp_path / "run" / earlier).parent.mkdir(parents=True)
    (tmp_path / "run" / earlier).touch()
    assert claim(tiny_config(), resume=False) == tmp_path / "run"


def test_sweeps_may_begin_before_the_run_they_belong_to(tiny_config, tmp_path):
    claim(tiny_config(f"run={tmp_path / 'run/sweeps/prompts/2'}"), resume=False)
    assert claim(tiny_config(), resume=False) == tmp_path / "run"
    with pytest.raises(ConfigError, match="already holds a run"):
        claim(tiny_config(), resume=False)


def test_a_file_is_no_run(tiny_config, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match="run: .*run is a file"):
        claim(tiny_config(), resume=False)


@pytest.mark.parametrize(
    "override, name",
    [
        ("seed=1", "seed"),
        ("classes=voc", "classes"),
        ("seeds.background=0.1", "seeds"),
        ("augment.crop=32", "augment"),
        ("clip.drop_path=0.2", "clip"),
        ("prompts.length=4", "prompts"),
        ("matching.chained=true", "matching"),
        ("decoder.head_channels=8", "decoder"),
        ("loss.balance=false", "loss"),
        ("data.train=elsewhere", "data.train"),
    ],
)
def test_a_run_goes_on_only_with_the_settings_it_began_with(tiny_config, tmp_path, override, name):
    claim(tiny_config(), resume=False)
    with pytest.raises(ConfigError, match=f"was made with another {re.escape(name)}; set it as in .*config.yaml"):
        claim(tiny_config(override), resume=True)
    assert load(tmp_path / "run/config.yaml") == tiny_config()


def test_what_does_not_change_the_model_or_its_data_may_change(tiny_config, tmp_path):
    claim(tiny_config(), resume=False)
    later = tiny_config("train.steps=40", "data.workers=1", "pseudo.crf=null", "precision=bf16", "train.log_every=1")
    claim(later, resume=True)
    assert load(tmp_path / "run/config.yaml") == later


# ------------------------------------------------------------------------------------------------------- command lines


def one_line(capsys, main, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        cli.run(main, arguments)
    out, error = capsys.readouterr()
    assert exit.value.code == 1 and out == ""
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("main", [weakclip.main, pseudo.main, evaluate.main], ids=lambda main: main.__module__)
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

    assert "disk full" in one_line(capsys, fail(OSError("disk full")))
    with pytest.raises(TypeError):
        cli.run(fail(TypeError("a bug")), [])
    with pytest.raises(SystemExit, match="130"):
        cli.run(fail(KeyboardInterrupt()), [])


def test_the_traceback_is_shown_on_request(monkeypatch):
    monkeypatch.setenv("WEAKCLIP_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        cli.run(weakclip.main, ["--config", "nowhere.yaml"])


def test_overrides_and_options_may_come_in_any_order(tiny_recipe):
    for arguments in (["--config", str(tiny_recipe), "seed=3", "--flag"], ["seed=3", "--flag", "--config", str(tiny_recipe)]):
        parser = argparse.ArgumentParser()
        parser.add_argument("--flag", action="store_true")
        config, options = cli.parse_config(parser, arguments)
        assert config.seed == 3 and options.flag


def test_a_command_fails_with_one_line_on_stderr(repo, tmp_path):
    command = [sys.executable, "-m", "weakclip.evaluate", "--config", "nowhere.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(repo)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: nowhere.yaml: no such config file\n"


def test_a_run_goes_on_with_the_shards_it_began_with_alone(tiny_config, make_shards, tmp_path):
    run = claim(tiny_config(), resume=False)
    first = make_shards(tmp_path / "first", count=4, per_shard=2)
    claim_data(run, [first.fingerprint])
    again = make_shards(tmp_path / "again", count=4, per_shard=2)  # the same bytes elsewhere
    claim_data(run, [again.fingerprint])
    resharded = make_shards(tmp_path / "resharded", count=4, per_shard=3)
    for others in ([resharded.fingerprint], [first.fingerprint, first.fingerprint]):
        with pytest.raises(ConfigError, match="the shards of data.train or data.mix are not those that .*run began with"):
            claim_data(run, others)
