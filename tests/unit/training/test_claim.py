"""The rules of claiming a run directory."""

from __future__ import annotations

import re

import pytest
import torch
import yaml

from weakclip.checkpoints.weights import packed
from weakclip.config import ConfigError
from weakclip.recipe import load
from weakclip.training import jobs
from weakclip.training.claim import MAY_CHANGE, claim_data, require_same_batch, require_same_settings
from weakclip.training.claim import claim as claim_job


def claim(config, resume):
    job = jobs.refine(config)
    claim_job(job, resume)
    return job.run


def test_a_new_run_is_made_with_its_resolved_config(tiny_config, tmp_path):
    config = tiny_config("run=" + str(tmp_path / "a/b"))
    assert claim(config, resume=False).root == tmp_path / "a/b"
    assert load(tmp_path / "a/b/config.yaml") == config


def test_a_crop_that_is_no_multiple_of_the_patch_claims_nothing(tiny_config, tmp_path):
    message = "augment.crop is 100; it must be a multiple of the patch, 16: the nearest are 96 and 112"
    with pytest.raises(ConfigError, match=message):
        claim(tiny_config("augment.crop=100"), resume=False)
    assert not (tmp_path / "run").exists()


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
    "override, change",
    [
        ("seed=1", "seed: 0 -> 1"),
        ("classes=voc", "classes: .*/names.txt -> voc"),
        ("precision=bf16", "precision: fp32 -> bf16"),
        ("seeds.background=0.1", "seeds.background: 0.45 -> 0.1"),
        ("augment.crop=32", "augment.crop: 64 -> 32"),
        ("clip.drop_path=0.2", "clip.drop_path: 0.0 -> 0.2"),
        ("prompts.length=4", "prompts.length: 8 -> 4"),
        ("matching.chained=true", "matching.chained: false -> true"),
        ("decoder.head_channels=8", "decoder.head_channels: 24 -> 8"),
        ("loss.weights.boundary=0", "loss.weights.boundary: 1.0 -> 0.0"),
        ("boundary.truncate_image=false", "boundary.truncate_image: true -> false"),
        ("optim.lr=0.5", "optim.lr: 0.0001 -> 0.5"),
        ("train.steps=40", "train.steps: 20 -> 40"),
        ("data.train=elsewhere", "data.train: data/voc/trainaug -> elsewhere"),
        ("data.scale=[256,64]", r"data.scale: \[128, 64\] -> \[256, 64\]"),
        ("data.shuffle_window=3", "data.shuffle_window: 2 -> 3"),
    ],
)
def test_a_run_resumes_only_with_the_settings_it_began_with(tiny_config, tmp_path, override, change):
    claim(tiny_config(), resume=False)
    message = rf"run: .*run was started with other settings \({change}\); keep those of .*config.yaml, or start .* with run=NEW; "
    with pytest.raises(ConfigError, match=message):
        claim(tiny_config(*override.split()), resume=True)
    assert load(tmp_path / "run/config.yaml") == tiny_config()


def test_every_key_that_changed_is_named(tiny_config):
    claim(tiny_config(), resume=False)
    with pytest.raises(ConfigError, match=r"\(seed: 0 -> 1, optim.lr: 0.0001 -> 0.5\)"):
        claim(tiny_config("optim.lr=0.5", "seed=1", "data.workers=1"), resume=True)


CHANGED = ("boundary.engine=exact", "train.batch=4", "train.accumulate=2", "train.deepspeed=other.json", "train.compile=off",
           "data.workers=1", "data.cache=there", "data.val=unseen", "data.labelled=there", "data.cache_gib=5",
           "data.retries=1", "data.timeout=5", "data.max_bad_samples=1",
           "train.log_every=1", "train.validate_every=5", "train.checkpoint_every=5", "train.keep_checkpoints=1",
           "train.pictures=0", "data.build={source: voc, devkit: there, split: train}")  # fmt: skip
"""A change of each key that may change in WeakCLIP's training, and of sections that other stages read."""
OTHER_STAGES = ("pseudo.crf=null", "retrain.network=segformer", "classify.optim.lr=1", "retrain.test.flip=false")


def test_what_does_not_decide_the_result_may_change(tiny_config, tmp_path):
    claim(tiny_config(), resume=False)
    later = tiny_config(*CHANGED, *OTHER_STAGES)
    claim(later, resume=True)
    assert load(tmp_path / "run/config.yaml") == later


def test_the_retrained_networks_own_training_is_held_to_the_same_list(tiny_config):
    network = ("retrain.network=segformer", "retrain.backbone=b0")
    claim_job(jobs.retrain(tiny_config(*network)), resume=False)
    claim_job(jobs.retrain(tiny_config(*network, "retrain.train.log_every=1", "retrain.test.flip=false", "loss.tau=1")), True)
    with pytest.raises(ConfigError, match=r"\(retrain.optim.lr: 0.0001 -> 0.5\)"):
        claim_job(jobs.retrain(tiny_config(*network, "retrain.optim.lr=0.5")), resume=True)


@pytest.fixture
def saved(tiny_config):
    """The run after 5 steps, the last ones of 2 ranks with batches of 4."""
    job = jobs.refine(tiny_config("train.batch=4"))
    claim_job(job, resume=False)
    job.run.checkpoint(5).parent.mkdir()
    meta = {"step": "5", "consumed": "52", "batch": "8"}  # the first steps were those of more ranks
    job.run.checkpoint(5).write_bytes(packed({"model/a": torch.zeros(1)}, meta))


@pytest.mark.parametrize(
    "overrides, ranks",
    [(["train.batch=8"], 1), (["train.batch=2", "train.accumulate=2"], 2), (["train.batch=2"], 4), (["train.batch=4"], 1)],
)
@pytest.mark.usefixtures("saved")
def test_the_batch_may_change_with_the_ranks_and_the_ranks_alone(tiny_config, overrides, ranks):
    require_same_batch(jobs.refine(tiny_config(*overrides)), ranks)


@pytest.mark.usefixtures("saved")
def test_another_global_batch_by_other_settings_is_refused(tiny_config):
    message = "train.batch x train.accumulate x ranks is 2 x 1 x 2 images a step, but the last steps of .*run took 8; change"
    with pytest.raises(ConfigError, match=message):
        require_same_batch(jobs.refine(tiny_config("train.batch=2")), ranks=2)


def test_a_run_without_a_checkpoint_has_no_batch_to_keep(tiny_config):
    claim(tiny_config("train.batch=4"), resume=False)
    require_same_batch(jobs.refine(tiny_config("train.batch=2")), ranks=1)


def test_the_settings_page_lists_what_may_change(repo):
    page = (repo / "docs/settings.md").read_text()
    listed = page.partition("those of WeakCLIP):")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([a-z_.]+)`", listed)) == set(MAY_CHANGE)
    assert {change.partition("=")[0] for change in CHANGED} | {"retrain.test"} == set(MAY_CHANGE)


def test_a_run_resumes_with_the_shards_it_began_with_alone(tiny_config, make_shards, tmp_path):
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
    require_same_settings(other)  # what the set holds is compared, and not its path
