"""Logging: plain lines on the terminal, everything with time and rank in a file."""

from __future__ import annotations

import logging
import re
import subprocess
import sys

import pytest

from weakclip.runtime import log

SAYS = """
import logging, sys, warnings
from weakclip.runtime.command_line import Parser, run

def main(arguments):
    Parser().parse_args(arguments)
    for name in ("weakclip.training", "DeepSpeed", "somebody"):
        for level in ("debug", "info", "warning", "error"):
            getattr(logging.getLogger(name), level)("%s of %s", level, name)
    warnings.warn("old call", FutureWarning)
    warnings.warn("slow tensor", UserWarning)

run(main)
"""


def said(repo, *options: str, rank: str = "0") -> list[str]:
    environment = {"PYTHONPATH": str(repo), "RANK": rank, "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", SAYS, *options], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == ""
    return [line for line in done.stderr.splitlines() if not line.startswith("  ")]


def test_people_see_plain_lines_and_libraries_warnings_that_matter(repo):
    lines = said(repo)
    wanted = ["info of weakclip.training", "warning: warning of weakclip.training", "error: error of weakclip.training"]
    assert lines[:-1] == [*wanted, "error: error of DeepSpeed", "warning: warning of somebody", "error: error of somebody"]
    assert "UserWarning: slow tensor" in lines[-1]


def test_quiet_leaves_warnings_and_verbose_shows_all(repo):
    assert said(repo, "-q")[0] == "warning: warning of weakclip.training"
    verbose = said(repo, "-v")
    assert {"debug of weakclip.training", "info of DeepSpeed", "debug of somebody"} <= set(verbose)
    assert any("FutureWarning: old call" in line for line in verbose)


def test_other_ranks_say_what_is_wrong_alone_and_who_they_are(repo):
    lines = said(repo, rank="3")
    assert lines[0] == "warning: rank 3: warning of weakclip.training" and not any("info of" in line for line in lines)


@pytest.fixture
def root_logger():
    root = logging.getLogger()
    level = root.level
    yield root
    root.setLevel(level)


def test_a_file_has_time_rank_and_origin_of_everything(tmp_path, root_logger):
    root_logger.setLevel(logging.INFO)
    path = tmp_path / "logs" / "rank-2.log"
    with log.to_file(path, rank=2):
        logging.getLogger("weakclip.training.loop").info("step 1")
        logging.getLogger("somebody").info("a notice")
    logging.getLogger("weakclip.training.loop").info("afterwards")
    first, second = path.read_text().splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} rank 2 INFO weakclip.training.loop: step 1", first)
    assert second.endswith("rank 2 INFO somebody: a notice")
    with log.to_file(path, rank=2):
        pass
    assert path.read_text().count("\n") == 2  # a resumed run appends
