"""Training on real ranks: the same losses on any number of ranks, exact resume, the files of a run, and bad input."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time

import psutil
import pytest
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.integration.conftest import ENVIRONMENT, REPO, command, metrics
from weakclip.data.index import Index

WITHOUT_CHANCE = ("matching.dropout=0", "decoder.dropout=0")
EVERY_STEP = ("train.log_every=1", "optim.warmup=2", "optim.lr=1e-3")


@pytest.fixture(scope="module")
def shards(make_shards, tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "train", count=11, per_shard=4)


@pytest.fixture(scope="module")
def train(launch, tiny_recipe, shards):
    def run(ranks, folder, *arguments, fails=False):
        data = () if any("data.train=" in argument for argument in arguments) else (f"data.train={shards.root}",)
        return launch(
            ranks, "weakclip.train", "--config", tiny_recipe, f"run={folder}", *data, *EVERY_STEP, *arguments, fails=fails
        )

    return run


@pytest.fixture(scope="module")
def alone(train, tmp_path_factory):
    """Losses of one process without torchrun, on the whole global batch."""
    run = tmp_path_factory.mktemp("alone") / "run"
    train(0, run, "train.steps=5", "train.batch=4", "optim.min_lr=1e-3", *WITHOUT_CHANCE)
    return metrics(run)


OPTIMIZER, PARAMETERS = ({f"offload_{what}": {"device": "cpu"}} for what in ("optimizer", "param"))


@pytest.mark.parametrize(
    "stage, offloaded", [(0, {}), (1, {}), (2, {}), (3, {}), (1, OPTIMIZER), (2, OPTIMIZER), (3, OPTIMIZER | PARAMETERS)]
)
def test_two_ranks_of_every_zero_stage_have_the_losses_of_one_process(train, alone, tmp_path, stage, offloaded):
    settings = json.loads((REPO / f"configs/deepspeed/zero{stage}.json").read_text())
    settings["zero_optimization"] |= offloaded
    if stage == 3:  # in parts, however small they are
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "deepspeed.json").write_text(json.dumps(settings))
    train(
        2,
        tmp_path / "run",
        "train.steps=5",
        "train.batch=2",
        "optim.min_lr=1e-3",
        f"train.deepspeed={tmp_path}/deepspeed.json",
        *WITHOUT_CHANCE,
    )
    assert len(alone) == 5
    assert metrics(tmp_path / "run") == pytest.approx(alone, abs=1e-4)


def test_an_accumulated_step_is_the_mean_of_its_micro_batches(train, tmp_path):
    still = ("train.batch=2", "optim.lr=1e-12", "optim.min_lr=0", *WITHOUT_CHANCE)  # weights that hardly move
    train(0, tmp_path / "two", "train.steps=2", *still)
    train(0, tmp_path / "one", "train.steps=1", "train.accumulate=2", *still)
    assert metrics(tmp_path / "one")[1] == pytest.approx(sum(metrics(tmp_path / "two").values()) / 2, rel=1e-5)


THIRTY_STEPS = ("train.steps=30", "data.workers=1", "train.checkpoint_every=3", "train.deepspeed=configs/deepspeed/zero2.json")


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """A run on two ranks that nothing disturbs."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(2, run, *THIRTY_STEPS)
    return run


@pytest.fixture
def started(tiny_recipe, shards, tmp_path):
    """The same run, just started: its directory and its process."""
    run = tmp_path / "run"
    arguments = ("--config", tiny_recipe, f"run={run}", f"data.train={shards.root}", *EVERY_STEP, *THIRTY_STEPS)
    line = command(2, "weakclip.train", *arguments)
    process = subprocess.Popen(line, env=ENVIRONMENT, cwd=REPO, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (run / "checkpoints" / "step-3.safetensors").exists():
        time.sleep(0.02)
    return run, process


def same_as(whole, run):
    ours, theirs = (load_file(folder / "weights" / "last.safetensors") for folder in (run, whole))
    return metrics(run) == metrics(whole) and all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_killed_run_goes_on_exactly(train, whole, started):
    run, process = started
    parent = psutil.Process(process.pid)
    for member in [parent, *parent.children(recursive=True)]:
        member.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # as after being killed while writing
    train(2, run, *THIRTY_STEPS, "--resume", "auto")
    assert same_as(whole, run)


def test_a_signal_to_one_rank_stops_all_at_one_step_and_the_run_goes_on_exactly(train, whole, started):
    run, process = started
    rank_1 = next(child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1")
    for member in [rank_1, *rank_1.children()]:  # to the group, as Slurm does: loader processes get it too
        member.send_signal(signal.SIGUSR2)
    said = process.communicate(timeout=300)[1]
    step = int(re.search(r"SIGUSR2: saved at step (\d+); resume with --resume auto", said)[1])
    assert process.returncode and 3 <= step < 30 and max(metrics(run)) == step
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert board.Scalars("loss/total")[-1].step == step  # the last points were not lost in a buffer
    train(2, run, *THIRTY_STEPS, "--resume", "auto")
    assert same_as(whole, run)


def test_doubtful_settings_are_one_warning_each(train, tmp_path):
    done = train(2, tmp_path / "run", "train.steps=1", "train.batch=8")
    lines = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    starts = [
        "warning: optim.warmup=2 is as long as the training",
        "warning: a step takes 16 images (train.batch x train.accumulate",
    ]
    assert [any(line.startswith(start) for line in lines) for start in starts] == [True, True] and len(lines) == 2


def test_what_a_run_leaves_behind(train, shards, tmp_path):
    run = tmp_path / "run"
    train(2, run, f"data.val={shards.root}", "train.steps=4", "train.validate_every=2", "train.checkpoint_every=1")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-3.safetensors", "step-4.safetensors"]
    trained = sum(tensor.size for tensor in load_file(run / "weights" / "last.safetensors").values())
    assert (run / "checkpoints" / "step-4.safetensors").stat().st_size < 3.5 * 4 * trained  # no frozen tower
    best = json.loads((run / "best.json").read_text())
    assert best["miou"] == max(metrics(run, "validation/miou").values())
    assert best["step"] in (2, 4)
    assert (run / "weights" / "best.safetensors").is_file()
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    wanted = {"loss/total", "loss/seeding", "loss/boundary", "loss/auxiliary", "lr", "gradient_norm", "images_per_second"}
    assert wanted | {"data_wait_percent", "memory_gib", "validation/miou"} <= set(board.Tags()["scalars"])
    assert board.Tags()["images"] == ["training images"]
    assert all(value > 0 for value in metrics(run, "gradient_norm").values())


@pytest.mark.parametrize("before, after", [((0, 0), (2, 3)), ((2, 1), (0, 0))])
def test_a_run_goes_on_with_other_ranks_and_another_zero_stage(train, alone, tmp_path, before, after):
    """(ranks, ZeRO stage) before and after the break; the losses are those of one process that never stopped."""
    for ranks, stage in (before, after):
        options = (f"train.deepspeed=configs/deepspeed/zero{stage}.json", f"train.batch={4 // max(ranks, 1)}", "--resume", "auto")
        steps = ("train.steps=5", "train.checkpoint_every=3", "optim.min_lr=1e-3")
        train(ranks, tmp_path / "run", *steps, *options, *WITHOUT_CHANCE)
        if (ranks, stage) == before:  # as if it had been killed after step 3
            (tmp_path / "run/checkpoints/step-5.safetensors").unlink()
    assert metrics(tmp_path / "run") == pytest.approx(alone, abs=1e-4)


def test_a_damaged_checkpoint_is_named(train, tmp_path):
    train(0, tmp_path / "run", "train.steps=1")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    done = train(2, tmp_path / "run", "train.steps=1", "--resume", "auto", fails=True)
    assert "step-1.safetensors: cannot be read as weights" in last_error(done)


def last_error(done):
    (line,) = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    return line


def test_another_runs_directory_is_refused(train, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to-mother.txt").write_text("dear")
    assert "holds files that belong to no run" in last_error(train(0, tmp_path / "letters", fails=True))
    train(0, tmp_path / "run", "train.steps=1")
    assert "already holds a run; resume it with --resume auto" in last_error(train(0, tmp_path / "run", fails=True))
    config = (tmp_path / "run/config.yaml").read_bytes()
    changed = train(0, tmp_path / "run", "--resume", "auto", "train.steps=1", "optim.lr=0.5", fails=True)
    assert "was started with other settings (optim.lr: 0.001 -> 0.5); keep those of" in last_error(changed)
    assert (tmp_path / "run/config.yaml").read_bytes() == config


@pytest.fixture
def damaged(make_shards, tmp_path):
    """A shard set whose image_1 and image_5 do not decode."""
    index = make_shards(tmp_path / "damaged", count=8, per_shard=4)
    for entry in index.entries:
        if entry.key in ("image_1", "image_5"):
            with open(index.root / entry.shard, "r+b") as file:
                file.seek(entry.offset + entry.length // 2)  # the image is the largest part of it
                file.write(b"\0" * 64)
    return index


def test_unreadable_images_are_skipped_and_named(train, damaged, tmp_path):
    done = train(2, tmp_path / "run", f"data.train={damaged.root}", "train.steps=4")
    assert done.stderr.count("no validation, since data.val is null") == 1 and "validating" not in done.stderr
    for key in ("image_1", "image_5"):
        assert sum(f"{key}: " in line and line.startswith("warning: skipped: ") for line in done.stderr.splitlines()) == 1
    assert metrics(tmp_path / "run", "bad_samples")[4] == 2


def test_too_many_unreadable_images_stop_the_job_on_every_rank(train, damaged, tmp_path):
    done = train(2, tmp_path / "run", f"data.train={damaged.root}", "train.steps=50", "data.max_bad_samples=1", fails=True)
    assert "more than data.max_bad_samples=1 unreadable samples" in last_error(done)


def test_a_truncated_shard_is_named(train, make_shards, tmp_path):
    root = make_shards(tmp_path / "short").root
    shard = root / "shard-00001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    assert "shard-00001.tar: shard is" in last_error(train(0, tmp_path / "run", f"data.train={root}", fails=True))
    assert not (tmp_path / "run").exists()
    assert Index.load(make_shards(tmp_path / "whole").root).shards
