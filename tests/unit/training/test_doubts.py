"""Warnings about settings that are allowed but seldom meant."""

from __future__ import annotations

import pytest

from weakclip.training import jobs
from weakclip.training.doubts import doubts

SOUND = ("optim.warmup=19", "train.batch=2")


def test_sound_settings_cause_no_warning(tiny_config):
    assert doubts(jobs.refine(tiny_config(*SOUND)), samples=4, ranks=2, earlier=4) == []


@pytest.mark.parametrize("warmup", [20, 1500])
def test_a_warm_up_as_long_as_the_training(tiny_config, warmup):
    (line,) = doubts(jobs.refine(tiny_config(*SOUND, f"optim.warmup={warmup}")), samples=4, ranks=1)
    assert line.startswith(f"optim.warmup={warmup} is as long as the training (train.steps=20), so the learning rate never")


@pytest.mark.parametrize("override, ranks", [("train.batch=8", 1), ("train.accumulate=4", 1), ("train.batch=2", 4)])
def test_a_global_batch_larger_than_the_set(tiny_config, override, ranks):
    (line,) = doubts(jobs.refine(tiny_config(*SOUND, override)), samples=7, ranks=ranks)
    assert line.startswith("a step takes 8 images (train.batch x train.accumulate x ranks), but there are only 7")


def test_a_global_batch_that_changed_when_the_run_was_resumed(tiny_config):
    (line,) = doubts(jobs.refine(tiny_config(*SOUND)), samples=100, ranks=1, earlier=4)
    assert line.startswith("a step takes 2 images (train.batch x train.accumulate x ranks), but took 4 before")


def test_classes_that_the_demos_clip_does_not_know(tiny_config):
    demo = (*SOUND, "clip.pretrained=demo")
    (line,) = doubts(jobs.refine(tiny_config(*demo, "classes=voc")), samples=100, ranks=1)
    assert line.startswith("clip.pretrained=demo: this CLIP knows the words of the demo's synthetic world only, not 'aeroplane'")
    assert doubts(jobs.refine(tiny_config(*demo)), samples=100, ranks=1) == []  # cat, dog, cow
    untexted = (*demo, "classes=voc", "decoder.score_map=false", "loss.weights.auxiliary=0")
    assert doubts(jobs.refine(tiny_config(*untexted)), samples=100, ranks=1) == []


def test_the_keys_are_those_of_the_job(tiny_config):
    job = jobs.retrain(tiny_config("retrain.network=segformer", "retrain.train.steps=9", "retrain.optim.warmup=9"))
    warmup, batch = doubts(job, samples=1, ranks=1)
    assert warmup.startswith("retrain.optim.warmup=9 is as long as the training (retrain.train.steps=9)")
    assert "retrain.train.batch x retrain.train.accumulate x ranks" in batch
