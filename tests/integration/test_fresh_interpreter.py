"""What shows only in an interpreter of its own: what commands print as they end, and which libraries they import."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.integration.conftest import ENVIRONMENT, REPO
from weakclip.cli import VERBS


def test_a_command_fails_with_one_line_on_stderr(tmp_path):
    command = [sys.executable, "-m", "weakclip.evaluate", "--config", "nowhere.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: nowhere.yaml: no such config file\n"


SCRIPTS = sorted(str(path.relative_to(REPO)) for folder in ("launch", "shards") for path in (REPO / folder).glob("*.py"))


@pytest.mark.parametrize("command", [*([script] for script in SCRIPTS), ["-m", "weakclip", "status"]], ids=" ".join)
def test_outside_its_environment_a_command_says_to_activate_it(command):
    without_libraries = [sys.executable, "-E", "-S", *command, "runs/voc"]
    done = subprocess.run(without_libraries, capture_output=True, text=True, cwd=REPO)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {sys.executable} has no module '") and done.stderr.count("\n") == 1
    cure = "activate the environment of the package first, such as with . .venv/bin/activate, or install what is missing in it"
    assert done.stderr.endswith(f"; {cure}\n")


def test_a_missing_module_of_our_own_is_a_bug():
    program = "from weakclip.runtime.environment import run; run('weakclip.absent:main')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1 and "Traceback" in done.stderr and "No module named 'weakclip.absent'" in done.stderr


def test_a_bug_keeps_its_traceback_in_the_terminal():
    program = "import numpy as np; from weakclip import cli; cli.run(lambda _: np.zeros(2) + np.zeros(3), [])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1 and "Traceback" in done.stderr and "could not be broadcast" in done.stderr


def test_a_closed_pipe_is_no_error():
    line = f"{sys.executable} -m weakclip.parameters --config configs/demo.yaml | true"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=ENVIRONMENT, cwd=REPO)
    assert done.stderr == ""


def test_a_login_node_need_not_load_torch():
    modules = "weakclip.stages, weakclip.cam, weakclip.launch.submit, weakclip.launch.status, weakclip.launch.job"
    line = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line], env=ENVIRONMENT).returncode == 0


HEAVY = ("torch", "torchvision", "deepspeed", "open_clip", "timm", "transformers", "webdataset", "tensorboard")
HEAVY += ("matplotlib", "pycocotools")

ON_A_RECIPE = [
    ["--config", "nowhere.yaml"],
    ["--config", "configs/demo.yaml", "train.bacth=1"],
    ["--config", "configs/demo.yaml", "train.batch=0"],
    ["--config", "configs/demo.yaml", "classes=nowhere.txt"],
]
NOWHERE = ["nowhere"]
MISTAKES = {
    "build": [["coco", "--images", "nowhere", "--annotations", "nowhere", "--out", "out"], ["folder"]],
    "verify": [NOWHERE],
    "show": [[*NOWHERE, "--out", "out.png"]],
    "stats": [NOWHERE, [*NOWHERE, "--config", "nowhere.yaml"]],
    "reshard": [[*NOWHERE, "--out", "out"]],
    "report": [NOWHERE],
    "predict": [["nowhere", "nowhere.jpg"], ["nowhere", "README.md"]],
    "submit": [["--stage", "train", *mistake] for mistake in ON_A_RECIPE],
    "status": [NOWHERE],
    "sweep": [NOWHERE],
    "doctor": [["--config", "nowhere.yaml"], ["train.batch=1"]],
    "convert": [[*NOWHERE, "out.txt"]],
    "fidelity": [NOWHERE],
    "retrain": [*ON_A_RECIPE, ["--config", "configs/demo.yaml"]],  # names no network
    "train": [*ON_A_RECIPE, ["--config", "configs/demo.yaml", "data.train=nowhere"]],
    "pseudo": [*ON_A_RECIPE, ["--config", "configs/demo.yaml", "run=nowhere"]],
    **dict.fromkeys(("cam", "test", "evaluate", "parameters", "demo"), ON_A_RECIPE),
}
"""Wrong arguments of each command."""

TRY_ALL = """
import json, runpy, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

results = []
for program, arguments in json.loads(sys.argv[1]):
    sys.argv = [program, *arguments]
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as error:
        try:
            run = runpy.run_path if program.endswith(".py") else runpy.run_module
            run(program, run_name="__main__")
        except SystemExit as stop:
            results.append([stop.code or 0, out.getvalue(), error.getvalue()])
print(json.dumps([results, sorted(sys.modules)]))
"""


@pytest.mark.parametrize("verb", VERBS)
def test_help_and_mistakes_of_every_command_load_no_heavy_library(verb):
    """In each of the ways to call it: seconds of imports come after the command line and the recipe are checked."""
    module = VERBS[verb].main.partition(":")[0]
    scripts = [str(path.relative_to(REPO)) for path in REPO.glob(f"*/{verb}.py") if path.parent.name in ("shards", "launch")]
    calls = [("weakclip", [verb, "--help"]), *((program, ["--help"]) for program in (module, *scripts))]
    calls += [("weakclip", [verb, *mistake]) for mistake in MISTAKES[verb]]
    command = [sys.executable, "-c", TRY_ALL, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT, cwd=REPO)
    results, modules = json.loads(done.stdout)
    for (_, arguments), (code, out, error) in zip(calls, results, strict=True):
        if arguments[-1] == "--help":
            assert code == 0 and out.startswith("usage: ")
        else:
            assert code in (1, 2) and "error: " in error and out == ""
    assert not {name.partition(".")[0] for name in modules}.intersection(HEAVY)


def test_workers_need_not_load_torch():
    modules = "weakclip.masks.finishing, weakclip.masks.crf, weakclip.evaluation.scoring"
    line = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", line], env=ENVIRONMENT).returncode == 0


def test_only_the_library_in_use_is_imported():
    program = (
        "import sys; from weakclip import registry; "
        "registry.load(registry.NETWORKS['resnet38'].network)(3, 8); print('timm' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout.split() == ["False", "False"]
