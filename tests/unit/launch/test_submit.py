"""launch/submit.py: what is submitted, skipped, and refused before any submission, and the requests to Slurm."""

from __future__ import annotations

import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weakclip import cli
from weakclip.config import ConfigError
from weakclip.data.index import Index
from weakclip.evaluation.metrics import Counts
from weakclip.evaluation.score_files import Scored
from weakclip.launch import journal, submit
from weakclip.launch.journal import Submission
from weakclip.launch.resources import Resources
from weakclip.masks import mask_folder
from weakclip.masks.mask_folder import MaskSettings
from weakclip.recipe import load, save
from weakclip.runtime import lock
from weakclip.runtime.run_dir import RunDir

SHARDS = 20
FEW = settings(max_examples=60, deadline=None)
GOLDEN = Path(__file__).with_name("submit_16x8.txt")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_shards) -> Path:
    """Twenty shards of one image each."""
    return make_shards(tmp_path_factory.mktemp("submit") / "set", count=SHARDS, per_shard=1, H=8, W=8).root


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def command(tiny_recipe, shards, run, programs):
    """`command("train", ...)`: the arguments for a stage of the tiny recipe on Slurm, changed by further ones."""
    recipe = ["--config", str(tiny_recipe), f"run={run}", f"data.train={shards}"]
    return lambda stage, *more: ["--stage", stage, "--cluster", "slurm", *recipe, *more]


@pytest.fixture
def config(tiny_config, shards):
    """The config of those arguments."""
    return lambda *overrides: tiny_config(f"data.train={shards}", *overrides)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """`programs(name=line)`: programs of these names that do what the shell line says. At first a Slurm that takes everything."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    monkeypatch.delenv("WEAKCLIP_CLUSTER", raising=False)

    def write(**lines: str) -> None:
        for name, line in lines.items():
            (folder / name).write_text(f"#!/bin/sh\n{line}\n")
            (folder / name).chmod(0o755)

    sbatch = f"""
        [ "$1" = --test-only ] && exec cat > {tmp_path}/tested
        cp "$1" {tmp_path}/script-$(ls {tmp_path} | grep -c script-)
        echo "Submitted batch job $(( 100 + $(ls {tmp_path} | grep -c script-) ))" """
    write(
        sbatch=sbatch, scancel=f'echo "$@" > {tmp_path}/cancelled', **dict.fromkeys(("srun", "squeue", "sacct", "scontrol"), "")
    )
    return write


def refused(capsys, arguments: list[str]) -> str:
    """The one line that it says instead of doing anything."""
    with pytest.raises(SystemExit) as exit:
        cli.run(submit.main, arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    return error


def submitted(tmp_path: Path) -> list[Path]:
    """Batch scripts, in the order in which Slurm got them."""
    return sorted(tmp_path.glob("script-*"))


def complete(config, run: Path, *stages: str) -> None:
    """What is there once these stages have run."""
    if "train" in stages:
        for name in (f"checkpoints/step-{config.train.steps}.safetensors", "weights/last.safetensors"):
            (run / name).parent.mkdir(parents=True)
            (run / name).touch()
        save(config, run / "config.yaml")
    if "pseudo" in stages:
        mask_folder.open_for_writing(run / "pseudo", MaskSettings.of(config), run / "weights/last.safetensors")
        for number in range(SHARDS):
            (run / f"pseudo/image_{number}.png").touch()
    if "evaluate" in stages:
        index = Index.load(config.data.train)
        for shard in index.shards:
            Scored.pseudo(RunDir(run)).write_counts(shard.name, Counts.zero(len(index.classes)))
        Scored.pseudo(RunDir(run)).add_up(index)


# ----------------------------------------------------------------------------------------------------------------- dry run


def scripts(printed: str, run: Path) -> str:
    """What a dry run printed, without what differs from one machine and version to the next."""
    return re.sub(r"code-[0-9a-f]{12}\b", "code-<hash>", printed.replace(str(run), "<run>").replace(sys.executable, "<python>"))


def test_a_dry_run_prints_the_batch_scripts_and_leaves_nothing(command, run, capsys, tmp_path):
    submit.main(command("all", "--nodes", "16", "--gpus-per-node", "8", "--dry-run"))
    assert scripts(capsys.readouterr().out, run) == GOLDEN.read_text()
    assert not run.exists() and not submitted(tmp_path)


def test_a_dry_run_without_slurm_prints_the_same_scripts_and_what_would_happen(command, run, capsys, programs):
    programs(scontrol="exit 1")
    submit.main(command("all", "--nodes", "16", "--gpus-per-node", "8", "--dry-run", "--cluster", "auto"))
    printed, note = scripts(capsys.readouterr().out, run).split("# No Slurm answers here: ")
    assert printed == GOLDEN.read_text()
    assert note == "without --dry-run these stages run on this machine, one after the other.\n"


def test_a_dry_run_on_this_machine_says_how_each_stage_runs(command, capsys):
    here = ("--cluster", "local", "--dry-run", "--gpus-per-node", "0")
    submit.main(command("all", *here, "--array-size", "5", "--array-parallelism", "2", "--time", "2:00:00"))
    assert capsys.readouterr().out.splitlines() == [
        "train: on this machine; ranks: 1; GPUs: 0; time limit 2:00:00",
        "pseudo: on this machine; tasks: 5, 2 at a time; GPUs: 0; time limit 2:00:00",
        "evaluate: on this machine; tasks: 5, 2 at a time; GPUs: 0; time limit 2:00:00",
    ]
    assert "nodes: 2, but there is only this machine" in refused(capsys, command("train", *here, "--nodes", "2"))


def test_a_verbose_dry_run_logs_the_recipe(command, config, caplog, tmp_path):
    caplog.set_level("DEBUG")
    submit.main(command("train", "--dry-run"))
    (text,) = [record.getMessage() for record in caplog.records if record.name == "weakclip.launch.submit"]
    (tmp_path / "recipe.yaml").write_text(text.removeprefix("the recipe:\n"))
    assert load(tmp_path / "recipe.yaml") == config()


def test_the_defaults_may_come_from_the_environment(command, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("partition: ours\ngpus_per_node: 2\n")
    arguments = command("train", "--dry-run", "--gpus-per-node", "4")
    for more, environment in (
        ([], {"WEAKCLIP_CLUSTER": str(tmp_path / "mine.yaml")}),
        (["--defaults", str(tmp_path / "mine.yaml")], {}),
    ):
        submit.main([*arguments, *more], environment)
        said = capsys.readouterr().out
        assert "#SBATCH --partition=ours\n" in said and "#SBATCH --gpus-per-node=4\n" in said


def test_an_array_that_makes_cams_has_a_part_for_each_shard_of_the_labelled_set(command, shards, tmp_path, capsys):
    labelled = (f"data.labelled={shards}", f"data.train={tmp_path}/cams")
    submit.main(command("all", "--dry-run", "--array-size", "7", *labelled))
    said = capsys.readouterr().out
    stages = [line.removeprefix("# ---- ") for line in said.splitlines() if line.startswith("# ----")]
    assert stages[:3] == ["cam: an array of 7 tasks", "train: one job", "pseudo: an array of 7 tasks"]
    assert "--array-size 21: there are only 20 shards" in refused(capsys, command("cam", "--array-size", "21", *labelled))


@pytest.mark.parametrize(
    "image, python", [("some image.sif", "apptainer exec --nv 'some image.sif' python3"), ("a/b:c", sys.executable)]
)
def test_the_program_of_a_job_in_a_container(command, capsys, image, python):
    submit.main(command("train", "--dry-run", "--container", image))
    said = capsys.readouterr().out
    assert f" {python} -u -m submitit.core._submit " in said
    assert ("--container-image=a/b:c" in said) == (image == "a/b:c")


# --------------------------------------------------------------------------------------------------------------- in slices


@FEW
@given(st.integers(1, 500), st.integers(1, 300))
def test_slices_are_even_and_hold_every_shard_once(shards, array_size):
    parts = [tuple(map(int, part.split(":"))) for part in submit.slices(shards, Resources(array_size=array_size), None)]
    assert len(parts) == min(shards, array_size)
    assert (parts[0][0], parts[-1][1]) == (0, shards)
    assert all(left[1] == right[0] for left, right in pairwise(parts))
    sizes = [end - start for start, end in parts]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


@FEW
@given(st.integers(1, 100), st.integers(1, 100))
def test_more_tasks_than_shards_are_refused_where_they_were_asked_for(shards, asked):
    resources = Resources(array_size=asked)
    if asked <= shards:
        assert len(submit.slices(shards, resources, asked)) == asked
    else:
        with pytest.raises(ConfigError, match=f"--array-size {asked}: there are only {shards} shards, and each"):
            submit.slices(shards, resources, asked)


# ---------------------------------------------------------------------------------------------------------------- mistakes


def test_an_unknown_stage_is_refused(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        submit.main(command("polish"))
    assert "argument --stage: invalid choice: 'polish'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stage, more, message",
    [
        ("train", ["train.bacth=2"], "train.bacth=2: unknown key 'train.bacth'; the nearest is 'train.batch'"),
        ("train", ["data.train=nowhere"], "nowhere/index.json: no such file; `python shards/build.py` makes a shard set, `py"),
        ("train", ["classes=coco"], "classes"),
        ("cam", [], "data.labelled is null; set it to the shard set with image labels that CAMs are made for"),
        ("cam", ["data.labelled=none", "data.build={source: folder, images: none}"], "none/index.json: no such file"),
        ("train", ["--nodes", "0"], "command line: nodes must be 1 or more"),
        ("train", ["--time", "soon"], "command line: time: 'soon' is not a Slurm time"),
        ("train", ["--defaults", "none.yaml"], "none.yaml: no such file; it should hold cluster defaults"),
        ("pseudo", ["--array-size", "21"], "--array-size 21: there are only 20 shards, and each task needs at least one"),
        ("all", ["--array-size", "21"], "--array-size 21: there are only 20 shards"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_submitted(command, capsys, run, tmp_path, stage, more, message):
    assert message in refused(capsys, command(stage, *more))
    assert not run.exists() and not submitted(tmp_path)


def test_another_runs_directory_is_refused(command, config, run, capsys, tmp_path):
    run.mkdir()
    save(config("seed=3"), run / "config.yaml")
    error = refused(capsys, command("all"))
    message = f"run: {run} was started with other settings (seed: 3 -> 0); keep those of {run}/config.yaml, or start another run"
    assert message in error
    assert [path.name for path in run.iterdir()] == ["config.yaml"] and not submitted(tmp_path)


def test_masks_of_other_options_are_refused(command, config, run, capsys, tmp_path):
    complete(config(), run, "train", "pseudo")
    error = refused(capsys, command("pseudo", "pseudo.flip=false"))
    message = f"{run}/pseudo holds masks of other weights or settings (see {run}/pseudo/about.json); remove it, or set run to "
    assert message + "another directory" in error
    assert not (run / "jobs").exists() and not submitted(tmp_path)


def test_masks_of_weights_that_are_gone_are_refused(command, config, run, capsys):
    complete(config(), run, "train", "pseudo")
    (run / "weights/last.safetensors").unlink()
    assert "holds masks of other weights or settings" in refused(capsys, command("pseudo"))


def test_a_run_that_is_worked_on_is_refused(command, run, capsys, tmp_path):
    run.mkdir()
    lock.take(RunDir(run))  # by this process, which is running
    assert f"run: {run} is in use by" in refused(capsys, command("train"))
    submit.main(command("train", "--dry-run"))  # changes nothing
    assert not (run / "jobs").exists() and not submitted(tmp_path)


def test_a_run_whose_job_waits_is_refused(command, run, capsys, tmp_path, programs):
    (run / "jobs").mkdir(parents=True)
    journal.add(RunDir(run), Submission.of("train", "41", None, "slurm", run / "jobs/1-train", []))
    programs(squeue='[ "$2" = --jobs=41 ] && echo PENDING')
    assert f"run: {run} has job 41 (train); wait, or cancel it with: scancel 41" in refused(capsys, command("train"))
    assert not submitted(tmp_path)
    programs(squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    submit.main(command("train"))
    assert len(submitted(tmp_path)) == 1


def test_a_job_to_wait_for_must_be_known(command, run, capsys, tmp_path, programs):
    programs(sacct='[ "$5" = --jobs=7 ] && echo "7|COMPLETED|None"')
    message = "--dependency afterok:7:8: Slurm knows no job 8"
    assert message in refused(capsys, command("train", "--dependency", "afterok:7:8"))
    assert not run.exists()
    submit.main(command("train", "--dependency", "afterok:7"))
    assert "#SBATCH --dependency=afterok:7\n" in submitted(tmp_path)[0].read_text()


# ----------------------------------------------------------------------------------------------------------- what is there


@pytest.mark.parametrize(
    "there, skipped, left",
    [
        ([], [], ["train", "pseudo", "evaluate"]),
        (["train"], ["train: complete (20/20 steps), skipped"], ["pseudo", "evaluate"]),
        (
            ["train", "pseudo"],
            ["train: complete (20/20 steps), skipped", "pseudo: complete (20/20 images), skipped"],
            ["evaluate"],
        ),
    ],
)
def test_what_is_complete_is_skipped(command, config, run, capsys, there, skipped, left):
    complete(config(), run, *there)
    submit.main(command("all", "--dry-run"))
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.endswith("skipped")] == skipped
    assert [line.split()[2].rstrip(":") for line in said if line.startswith("# ----")] == left


def test_nothing_is_submitted_where_all_is_complete(command, config, run, capsys, tmp_path):
    complete(config(), run, "train", "pseudo", "evaluate")
    submit.main(command("all"))
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["train", "pseudo", "evaluate"]
    assert not (run / "jobs").exists() and not submitted(tmp_path)


def test_masks_of_an_earlier_training_are_not_those_of_the_next(command, config, run, capsys, tmp_path):
    complete(config(), run, "train", "pseudo", "evaluate")
    (run / "checkpoints/step-20.safetensors").rename(run / "checkpoints/step-10.safetensors")
    message = "pseudo: 20/20 images of an earlier train exist; remove them, submit train alone, or change run"
    assert message in refused(capsys, command("all"))
    submit.main(command("train"))
    assert len(submitted(tmp_path)) == 1


def test_scores_are_made_anew_after_masks(command, config, run, capsys):
    complete(config(), run, "train", "pseudo", "evaluate")
    (run / "pseudo/image_3.png").unlink()
    submit.main(command("all", "--dry-run"))
    said = capsys.readouterr().out
    assert said.count("skipped") == 1 and "# ---- pseudo:" in said and "# ---- evaluate:" in said


# ------------------------------------------------------------------------------------------------------------- to a Slurm


def test_each_job_waits_for_the_one_before_and_is_noted(command, run, capsys, tmp_path):
    submit.main(command("all", "--name", "tiny", "--array-size", "5"))
    scripts = [path.read_text() for path in submitted(tmp_path)]
    assert [re.findall(r"--dependency=(.*)", script) for script in scripts] == [[], ["afterok:101"], ["afterok:102"]]
    assert [re.findall(r"--job-name=(.*)", script) for script in scripts] == [["tiny-train"], ["tiny-pseudo"], ["tiny-evaluate"]]
    entries = journal.read(RunDir(run))
    assert [(entry.stage, entry.job, entry.tasks, entry.after) for entry in entries] == [
        ("train", "101", None, []),
        ("pseudo", "102", 5, ["101"]),
        ("evaluate", "103", 5, ["102"]),
    ]
    assert [entry.folder for entry in entries] == [str(run / f"jobs/{n}-{entry.stage}") for n, entry in enumerate(entries, 1)]
    said = capsys.readouterr().out
    assert "pseudo    job 102_[0-4]" in said and "cancel    scancel 101 102 103\n" in said


def test_a_job_runs_the_recipe_and_the_program_as_they_were_submitted(command, config, run, tmp_path):
    submit.main(command("train"))
    again = load(run / "jobs/1-train/config.yaml")
    settings = Path(again.train.deepspeed)
    assert settings.parent == run / "jobs/1-train" and settings.read_bytes() == Path(config().train.deepspeed).read_bytes()
    assert again == config(f"train.deepspeed={settings}")
    (code,) = (run / "jobs").glob("code-*")
    assert {path.name for path in code.iterdir()} == {"weakclip"} and not list(code.rglob("*.pyc"))
    assert f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}\n" in submitted(tmp_path)[0].read_text()


def test_the_next_submission_has_a_folder_of_its_own_and_the_same_copy_of_the_program(command, run):
    submit.main(command("train"))
    submit.main(command("train"))
    assert [path.name for path in sorted((run / "jobs").glob("*-train"))] == ["1-train", "2-train"]
    assert len(list((run / "jobs").glob("code-*"))) == 1


def test_what_slurm_would_not_take_is_said_in_its_words_before_anything_is_submitted(command, run, capsys, programs):
    programs(sbatch='echo "sbatch: error: invalid partition specified: gpu" >&2; echo "allocation failure: no" >&2; exit 1')
    assert refused(capsys, command("all")) == "error: Slurm rejects it: invalid partition specified: gpu no\n"
    assert not run.exists()


def test_a_chain_that_slurm_takes_in_part_is_withdrawn(command, capsys, programs, tmp_path):
    programs(sbatch='[ "$1" = --test-only ] && exit; grep -q -- --array "$1" && exit 1; echo Submitted batch job 55')
    assert refused(capsys, command("all")).startswith("error: pseudo: Slurm rejects it: ")
    assert (tmp_path / "cancelled").read_text() == "55\n"


def test_nothing_is_withdrawn_where_nothing_was_taken(command, capsys, programs, tmp_path):
    programs(sbatch='[ "$1" = --test-only ] && exit; exit 1')
    assert refused(capsys, command("train")).startswith("error: train: Slurm rejects it: ")
    assert not (tmp_path / "cancelled").exists()


def test_slurms_words_are_one_line_at_the_submission_too(command, capsys, programs):
    programs(sbatch='[ "$1" = --test-only ] && exit; echo "sbatch: error: one" >&2; echo "sbatch: error: two" >&2; exit 1')
    with pytest.raises(SystemExit, match="1"):
        cli.run(submit.main, command("train"))
    line = capsys.readouterr().err.splitlines()[-1]  # after submitit's
    assert line.startswith("error: train: Slurm rejects it: ") and "one" in line and "two" in line


def test_a_machine_without_slurm_says_so(command, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    message = "--cluster slurm: this machine has no sbatch; submit from a login node, or use --cluster local"
    assert message in refused(capsys, command("train"))
