"""Work of one rank while the others wait, with two real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from weakclip.runtime.ranks import on_first

RANK = """
import sys
import torch.distributed as dist
from pathlib import Path
from weakclip.config import ConfigError
from weakclip.runtime.ranks import on_first

def work():
    (folder / f"worked-{rank}").touch()
    if fails:
        raise ConfigError("no network")
    return [folder / "weights"]

rank, folder, fails = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "fails"
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
try:
    print("found", on_first(work)[0].name)
except ConfigError as error:
    print("error", error)
"""


@pytest.mark.parametrize("outcome, said", [("works", "found weights"), ("fails", "error no network")])
def test_the_first_rank_works_and_the_others_get_its_result_or_its_error(tmp_path: Path, outcome, said):
    commands = [[sys.executable, "-c", RANK, str(rank), str(tmp_path), outcome] for rank in (0, 1)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    assert [rank.communicate(timeout=120)[0].strip() for rank in ranks] == [said, said]
    assert [path.name for path in tmp_path.glob("worked-*")] == ["worked-0"]


def test_a_process_alone_works_itself():
    assert on_first(lambda: 3) == 3
