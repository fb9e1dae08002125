"""What shows only in an interpreter of its own: what commands print as they end, and which libraries they import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.integration.conftest import ENVIRONMENT, REPO


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
    assert done.stderr.endswith("; activate the environment of the package first, such as with . .venv/bin/activate\n")


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
