"""Sweeps: the settings of the shipped ones, the choice of a task, and errors that name file and key."""

from __future__ import annotations

import argparse
import json

import pytest

from weakclip import cli, sweep
from weakclip.config import ConfigError
from weakclip.recipe import Sweep, is_sweep, load

TASKS = """
tasks:
  "small": [train.batch=2, "data.scale=[128,64]"]
  "large": [train.batch=8]
"""


@pytest.fixture(autouse=True)
def no_array(monkeypatch):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)


@pytest.fixture
def write(tmp_path):
    """Writes sweep.yaml of a small recipe and the given tasks, or other text."""
    (tmp_path / "recipe.yaml").write_text("train: {steps: 7}\ndata: {val: '${run}/val'}\n")

    def write(tasks: str = TASKS, head: str = f"recipe: {tmp_path}/recipe.yaml\nrun: {tmp_path}/sweeps/batch\n"):
        (tmp_path / "sweep.yaml").write_text(head + tasks)
        return tmp_path / "sweep.yaml"

    return write


def parsed(*arguments):
    return cli.parse_config(argparse.ArgumentParser(), [str(argument) for argument in arguments])[0]


@pytest.mark.parametrize(
    "name, key, values",
    [
        ("prompts", "prompts.length", ["2", "4", "8", "16"]),
        ("temperatures", "matching.temperature", ["1", "0.1", "0.01", "0.001"]),
    ],
)
def test_the_shipped_sweeps_are_the_papers_ablations(repo, monkeypatch, name, key, values):
    monkeypatch.chdir(repo)
    found = Sweep.read(f"configs/sweeps/{name}.yaml")
    assert [task.name for task in found.tasks] == values
    for index, value in enumerate(values):
        run = f"runs/voc/sweeps/{name}/{value}"
        assert found.config(index) == load("configs/voc.yaml", [f"{key}={value}", f"run={run}"])


def test_a_task_is_the_recipe_with_its_overrides_and_a_run_of_its_own(write, tmp_path):
    config = parsed("--config", write(), "--task", 0)
    run = str(tmp_path / "sweeps/batch/small")
    assert config == load(tmp_path / "recipe.yaml", ["train.batch=2", "data.scale=[128,64]", f"run={run}"])
    assert (config.run, config.data.val, config.train.steps) == (run, f"{run}/val", 7)


def test_overrides_of_the_command_line_come_last(write):
    config = parsed("train.batch=3", "--config", write(), "--task", 1, "seed=5")
    assert (config.train.batch, config.seed) == (3, 5)


def test_an_array_of_jobs_chooses_the_task_and_the_option_beats_it(write, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert parsed("--config", write()).train.batch == 8
    assert parsed("--config", write(), "--task", 0).train.batch == 2
    found = Sweep.read(write())
    for wrong in ("2", "x", ""):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", wrong)
        with pytest.raises(ConfigError, match=f"SLURM_ARRAY_TASK_ID: .*sweep.yaml has no task {wrong}; .* --array=0-1"):
            found.config(None)


def test_without_a_choice_the_tasks_are_listed(write):
    with pytest.raises(
        ConfigError, match=r"sweep.yaml is a sweep of 0 \(small\), 1 \(large\); choose one by --task, .*array=0-1"
    ):
        parsed("--config", write())


@pytest.mark.parametrize("index", [-1, 2])
def test_a_task_out_of_range_is_an_error(write, index):
    with pytest.raises(ConfigError, match=f"--task: .*sweep.yaml has no task {index}; the whole sweep is --array=0-1"):
        parsed("--config", write(), "--task", index)


def test_a_recipe_has_no_tasks(tmp_path, write, monkeypatch):
    write()
    with pytest.raises(ConfigError, match="--task 0: .*recipe.yaml is not a sweep, such as configs/sweeps/prompts.yaml"):
        parsed("--config", tmp_path / "recipe.yaml", "--task", 0)
    with pytest.raises(ConfigError, match="nowhere.yaml: no such config file"):
        parsed("--config", tmp_path / "nowhere.yaml", "--task", 0)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "9")  # such as an array over shards
    assert parsed("--config", tmp_path / "recipe.yaml").train.steps == 7


def test_a_recipe_is_told_from_a_sweep(repo, write, tmp_path):
    assert is_sweep(write()) and is_sweep(write("tasks: 3", head="")) and is_sweep(write("", head="recipe: x"))
    assert not any(is_sweep(path) for path in (repo / "configs").glob("*.yaml"))
    assert not is_sweep(tmp_path / "nowhere.yaml") and not is_sweep(write("tasks: [", head=""))


@pytest.mark.parametrize(
    "tasks, message",
    [
        ("", "sweep.yaml: a sweep has the keys recipe, run, tasks .*; this file has recipe, run$"),
        ('tasks: {"2": []}\nrecipes: x', "the keys recipe, run, tasks .*; this file has recipe, run, tasks, recipes"),
        ("tasks:", "sweep.yaml: tasks: needs at least one entry"),
        ("tasks: {}", "sweep.yaml: tasks: needs at least one entry"),
        ("tasks: [seed=1]", 'sweep.yaml: tasks: needs at least one entry, written "NAME": '),
        ("tasks: {2: [seed=1]}", "sweep.yaml: tasks.2: the name becomes a directory; write it in quotes"),
        ('tasks: {"a/b": [seed=1]}', "sweep.yaml: tasks.a/b: the name becomes a directory"),
        ('tasks: {"..": [seed=1]}', "sweep.yaml: tasks...: the name becomes a directory"),
        ('tasks: {"2": seed=1}', r"sweep.yaml: tasks.2: 'seed=1' is not a list of overrides, such as \["),
        ('tasks: {"2": [seed: 1]}', "sweep.yaml: tasks.2: .* is not a list of overrides"),
        ('tasks: {"2":}', "sweep.yaml: tasks.2: None is not a list of overrides"),
        ('tasks: {"2": [seed]}', "sweep.yaml: tasks.2: 'seed': an override is written key.sub=value"),
        ('tasks: {"1": [], "2": [sed=1]}', "sweep.yaml: tasks.2: sed=1: unknown key 'sed'; the nearest is 'seed'"),
        ('tasks: {"2": [train.batch=many]}', "sweep.yaml: tasks.2: train.batch=many: train.batch: "),
        ('tasks: {"2": [train.batch=0]}', "sweep.yaml: tasks.2: .*recipe.yaml: train.batch must be 1 or more"),
        ('tasks: {"2": [run=here]}', "sweep.yaml: tasks.2: remove run; the sweep gives each task"),
        ('tasks: {"2": [], "2": []}', "sweep.yaml: .*duplicate"),
        ('tasks: {"2": []}\nrepeats:', "sweep.yaml: repeats: needs at least one entry"),
        ('tasks: {"2": []}\nrepeats: {1: []}', "sweep.yaml: repeats.1: the name becomes a directory; write it in quotes"),
        ('tasks: {"2": []}\nrepeats: {"a": [], "b": [sed=1]}', "sweep.yaml: tasks.2/b: sed=1: unknown key 'sed'"),
        ("tasks: [", "sweep.yaml: "),
    ],
)
def test_a_mistake_names_the_file_and_the_key(write, tasks, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Sweep.read(write(tasks))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "head, message",
    [
        ("recipe: nowhere.yaml\nrun: runs/a\n", "sweep.yaml: recipe: nowhere.yaml: no such config file"),
        ("recipe: [a]\nrun: runs/a\n", r"sweep.yaml: recipe: \['a'\] is not a path"),
        ("recipe: a.yaml\nrun:\n", "sweep.yaml: run: None is not a path"),
        ("- a\n#", "sweep.yaml: a sweep has the keys recipe, run, tasks .*; this file has none"),
    ],
)
def test_a_mistake_in_the_head_is_named_too(write, head, message):
    with pytest.raises(ConfigError, match=message):
        Sweep.read(write('tasks: {"2": []}' if head.startswith("r") else "", head=head))


def test_the_command_lists_the_tasks(repo, monkeypatch, capsys):
    monkeypatch.chdir(repo)
    sweep.main(["configs/sweeps/prompts.yaml"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "configs/sweeps/prompts.yaml: configs/voc.yaml as sbatch --array=0-3"
    assert [line.split() for line in lines[1:]] == [
        ["task", "name", "run", "overrides"],
        ["0", "2", "runs/voc/sweeps/prompts/2", "prompts.length=2"],
        ["1", "4", "runs/voc/sweeps/prompts/4", "prompts.length=4"],
        ["2", "8", "runs/voc/sweeps/prompts/8", "prompts.length=8"],
        ["3", "16", "runs/voc/sweeps/prompts/16", "prompts.length=16"],
    ]
    with pytest.raises(ConfigError, match="nowhere.yaml: no such sweep file"):
        sweep.main(["nowhere.yaml"])


REPEATED = (
    TASKS
    + """
repeats:
  "a": [seed=0]
  "b": [seed=1, train.batch=3]
"""
)


def test_each_task_is_repeated_and_a_repeats_overrides_come_after_the_tasks(write, tmp_path):
    names = ["small/a", "small/b", "large/a", "large/b"]
    found = Sweep.read(write(REPEATED))
    assert [task.name for task in found.tasks] == names
    configs = [found.config(index) for index in range(4)]
    assert [config.run for config in configs] == [str(tmp_path / "sweeps/batch" / name) for name in names]
    assert [(config.seed, config.train.batch) for config in configs] == [(0, 2), (1, 3), (0, 8), (1, 3)]


def test_figures_of_a_single_run_have_no_spread(write, tmp_path, capsys):
    (tmp_path / "sweeps/batch/small").mkdir(parents=True)
    (tmp_path / "sweeps/batch/small/scores.json").write_text('{"cam": 40, "cam_crf": 51.25}')
    sweep.main([str(write()), "--json", str(tmp_path / "figures.json")])
    assert json.loads((tmp_path / "figures.json").read_text()) == {"small": {"cam": 40, "cam_crf": 51.25}}
    listed = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert listed == [["small", "1", "40.0", "51.2"], ["large", "0", "-", "-"]]
