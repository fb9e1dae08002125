"""A sweep's tasks run on this machine, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.conftest import ENVIRONMENT
from tests.unit.test_sweep import REPEATED
from weakclip import report, sweep
from weakclip.evaluation.published import Paper
from weakclip.recipe import Sweep
from weakclip.runtime.errors import UserError


def written(folder: Path, tasks: str) -> Path:
    """sweep.yaml of a small recipe and these tasks."""
    (folder / "recipe.yaml").write_text("train: {steps: 7}\n")
    (folder / "sweep.yaml").write_text(f"recipe: {folder}/recipe.yaml\nrun: {folder}/sweeps/batch\n{tasks}")
    return folder / "sweep.yaml"


MODULE = """
import argparse
import json
import sys
from pathlib import Path

from weakclip import cli

config = cli.parse_config(argparse.ArgumentParser(), sys.argv[1:])[0]
with open("ran.txt", "a") as log:
    print(config.run.split("batch/")[1], file=log)
if config.train.batch == 8 and not Path("mended").exists():
    raise SystemExit("no")
Path(config.run).mkdir(parents=True)
Path(config.run, "scores.json").write_text(json.dumps({"cam": 40.0 + config.train.batch + config.seed}))
"""


def test_what_has_no_scores_is_run_here_and_the_figures_are_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "module.py").write_text(MODULE)
    with pytest.raises(UserError, match="sweep.yaml: large/a failed; run the same command again"):
        sweep.main([str(written(tmp_path, REPEATED)), "--run", "module"])
    (tmp_path / "mended").touch()
    sweep.main([str(written(tmp_path, REPEATED)), "--run", "module"])
    assert (tmp_path / "ran.txt").read_text().split() == ["small/a", "small/b", "large/a", "large/b", "large/a"]
    figures = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[-3:]]
    assert figures == ["task runs cam", "small 2 43.0 ± 1.4", "large 2 46.0 ± 2.8"]


NOT_ALONE = """
import os
import time

print("threads", os.environ["OMP_NUM_THREADS"])
end = time.monotonic() + 60
while len(Path("ran.txt").read_text().split()) < 2:
    if time.monotonic() > end:
        raise SystemExit("no other runs beside it")
    time.sleep(0.1)
"""


def test_several_tasks_run_at_a_time_and_print_into_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "module.py").write_text(MODULE + NOT_ALONE)
    (tmp_path / "mended").touch()
    sweep.main([str(written(tmp_path, REPEATED)), "--run", "module", "--jobs", "2"])
    assert sorted((tmp_path / "ran.txt").read_text().split()) == ["large/a", "large/b", "small/a", "small/b"]
    threads = max(len(os.sched_getaffinity(0)) // 2, 1)
    assert (tmp_path / "sweeps/batch/small/a.log").read_text() == f"threads {threads}\n"
    assert "small 2 43.0 ± 1.4" in " ".join(capsys.readouterr().out.split())


ENDLESS = """
import os
import time

Path("pid").write_text(str(os.getpid()))
time.sleep(120)
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_sigterm_ends_what_runs_as_well(tmp_path, jobs):
    (tmp_path / "module.py").write_text(f"from pathlib import Path\n{ENDLESS}")
    path = written(tmp_path, 'tasks: {"small": []}\n')
    line = [sys.executable, "-m", "weakclip.sweep", path, "--run", "module", "--jobs", str(jobs)]
    with subprocess.Popen(line, cwd=tmp_path, env=ENVIRONMENT) as command:
        end = time.monotonic() + 60
        while not ((tmp_path / "pid").is_file() and (tmp_path / "pid").read_text()) and time.monotonic() < end:
            time.sleep(0.1)
        command.terminate()
        assert command.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_papers_ablations_are_the_shipped_sweeps(repo, monkeypatch):
    monkeypatch.chdir(repo)
    published = Paper.of("voc").sweeps
    shipped = {path.stem: Sweep.read(path) for path in (repo / "configs/sweeps").glob("*.yaml")}
    of_the_paper = {name for name, sweep in shipped.items() if sweep.recipe != Path("configs/demo.yaml")}
    assert set(published) == set(report.SWEEPS) == of_the_paper
    for name, values in published.items():
        assert [str(task.run) for task in shipped[name].tasks] == [f"runs/voc/sweeps/{name}/{value}" for value in values]
