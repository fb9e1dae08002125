"""The rules of claiming a run directory."""

from __future__ import annotations

import re

import pytest
import yaml

from weakclip.config import ConfigError
from weakclip.recipe import load
from weakclip.training import jobs
from weakclip.training.claim import claim as claim_job
from weakclip.training.claim import claim_data, require_same_settings


def claim(config, resume):
    job = jobs.refine(config)
    claim_job(job, resume)
    return job.run


def test_a_new_run_is_made_with_its_resolved_config(tiny_config, tmp_path):
    config = tiny_config("run=" + str(tmp_path / "a/b"))
    assert claim(config, resume=False).root == tmp_path / "a/b"
    assert load(tmp_path / "a/b/config.yaml") == config


def test_an_empty_directory_is_taken_and_resume_begins_where_there_is_nothing(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    claim(tiny_config(), resume=True)
    assert (tmp_path / "run/config.yaml").is_file()


def test_a_run_is_not_begun_twice(tiny_config):
    claim(tiny_config(), resume=False)
    with pytest.raises(ConfigError, match="already holds a run; resume it with --resume auto, or set run"):
        claim(tiny_config(), resume=False)


def test_files_of_something_else_are_left_alone(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").touch()
    for resume in (False, True):
        with pytest.raises(ConfigError, match="holds files that belong to no run; set run"):
            claim(tiny_config(), resume)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("earlier", ["scores-seeds.json", "shards/train/index.json"])
def test_cams_may_be_made_and_scored_in_the_folder_before_the_run(tiny_config, tmp_path, earlier):
    (tmp_path / "run" / earlier).parent.mkdir(parents=True)
    (tmp_path / "run" / earlier).touch()
    assert claim(tiny_config(), resume=False).root == tmp_path / "run"


def test_sweeps_may_begin_before_the_run_they_belong_to(tiny_config, tmp_path):
    claim(tiny_config(f"run={tmp_path / 'run/sweeps/prompts/2'}"), resume=False)
    assert claim(tiny_config(), resume=False).root == tmp_path / "run"
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
    with pytest.raises(ConfigError, match=f"was started with another {re.escape(name)}; set it as in .*config.yaml"):
        claim(tiny_config(override), resume=True)
    assert load(tmp_path / "run/config.yaml") == tiny_config()


def test_what_does_not_change_the_model_or_its_data_may_change(tiny_config, tmp_path):
    claim(tiny_config(), resume=False)
    later = tiny_config("train.steps=40", "data.workers=1", "pseudo.crf=null", "precision=bf16", "train.log_every=1")
    claim(later, resume=True)
    assert load(tmp_path / "run/config.yaml") == later


def test_a_run_goes_on_with_the_shards_it_began_with_alone(tiny_config, make_shards, tmp_path):
    run = claim(tiny_config(), resume=False)
    first = make_shards(tmp_path / "first", count=4, per_shard=2)
    claim_data(run, [first.fingerprint])
    again = make_shards(tmp_path / "again", count=4, per_shard=2)  # the same bytes at another path
    claim_data(run, [again.fingerprint])
    resharded = make_shards(tmp_path / "resharded", count=4, per_shard=3)
    for others in ([resharded.fingerprint], [first.fingerprint, first.fingerprint]):
        with pytest.raises(ConfigError, match="the shards of data.train or data.mix are not those that .*run was started with"):
            claim_data(run, others)


OLD = {
    "cam": {"data": "labelled", "source": "mctformer"},
    "data": {"train": "cams", "build": ["folder", "--images", "images"]},
    "loss": {"boundary": False, "auxiliary": 0.2},
}
"""What a recipe of an earlier version says under its old keys."""


def test_a_run_of_an_earlier_version_is_resumed(tiny_config, tmp_path):
    config = tiny_config(
        "data.labelled=labelled", "cam.source=mctformer", "data.train=cams", "loss.weights={boundary: 0, auxiliary: 0.2}"
    )
    folder = claim(config, resume=False).root
    old = yaml.safe_load((folder / "config.yaml").read_text())
    for key in ("labelled", "build"):
        del old["data"][key]
    del old["loss"]["weights"]
    for group, values in OLD.items():
        old[group] |= values
    (folder / "config.yaml").write_text(yaml.safe_dump(old))
    require_same_settings(jobs.refine(config))
    claim(config, resume=True)
    assert load(folder / "config.yaml") == config


def test_a_classifier_of_an_earlier_version_is_resumed(tiny_config, tmp_path):
    """Its recipe named the labelled set as data.train."""
    job = jobs.classify(tiny_config("data.labelled=labelled", "cam.source=mctformer", "data.train=cams"))
    claim_job(job, resume=False)
    old = yaml.safe_load(job.run.config.read_text())
    old["data"] |= {"train": "labelled"}
    del old["data"]["labelled"]
    old["cam"]["data"] = None
    job.run.config.write_text(yaml.safe_dump(old))
    claim_job(job, resume=True)
    other = jobs.classify(tiny_config("data.labelled=elsewhere", "cam.source=mctformer", "data.train=cams"))
    with pytest.raises(ConfigError, match="was started with another data.labelled"):
        require_same_settings(other)
