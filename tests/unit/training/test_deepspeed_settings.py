"""DeepSpeed's JSON file: what works, and one line with file and key for what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weakclip.config import Config, ConfigError
from weakclip.training import deepspeed_file
from weakclip.training.deepspeed_settings import deepspeed_settings


@pytest.mark.parametrize("stage", range(4))
def test_every_deepspeed_file_is_filled_from_the_recipe(repo, tiny_config, stage):
    config = tiny_config(
        f"train.deepspeed={repo}/configs/deepspeed/zero{stage}.json", "train.batch=3", "train.accumulate=2", "optim.clip_grad=0.5"
    )
    settings = deepspeed_settings(config.train, config.optim)
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["train_micro_batch_size_per_gpu"] == 3
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 0.5


def with_file(folder: Path, text: str) -> Config:
    config = Config()
    config.train.deepspeed = str(folder / "ds.json")
    (folder / "ds.json").write_text(text)
    return config


def settings_of(folder: Path, stage: int = 2, zero: dict[str, Any] | None = None, **further: Any) -> dict[str, Any]:
    config = with_file(folder, json.dumps({"zero_optimization": {"stage": stage, **(zero or {})}, **further}))
    return deepspeed_settings(config.train, config.optim)


def refused(folder: Path, stage: int = 2, zero: dict[str, Any] | None = None, **further: Any) -> str:
    """Return what is said after the name of the file."""
    with pytest.raises(ConfigError) as caught:
        settings_of(folder, stage, zero, **further)
    start = f"train.deepspeed: {folder}/ds.json: "
    assert str(caught.value).startswith(start) and "\n" not in str(caught.value)
    return str(caught.value).removeprefix(start)


@pytest.mark.parametrize("key, ours", deepspeed_file.IN_THE_RECIPE.items())
def test_what_the_recipe_sets_may_not_stand_in_deepspeeds_file(tmp_path, key, ours):
    assert refused(tmp_path, **{key: 1}) == f"{key}: leave it out, and set {ours} in the recipe"


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is not valid JSON: Expecting value: line 1"),
        ('{"zero_optimization": {"stage": 1},}', "is not valid JSON: .*: line 1 column 3"),
        ('{"a": 1, "a": 2}', "is not valid JSON: 'a' is set twice"),
        ('{"a": ' + "[" * 100_000, "is not valid JSON: "),
        ("[]", "does not set zero_optimization.stage, as in "),
        ("{}", "does not set zero_optimization.stage, as in "),
        ('{"zero_optimization": {}}', "does not set zero_optimization.stage, as in "),
        ('{"zero_optimization": true}', "does not set zero_optimization.stage, as in "),
    ],
)
def test_a_file_that_is_none_of_deepspeeds_is_refused_before_deepspeed_is_loaded(tmp_path, text, said):
    with pytest.raises(ConfigError, match=f"train.deepspeed: .*ds.json {said}"):
        deepspeed_file.read(with_file(tmp_path, text).train)


def test_a_missing_file_is_refused(tmp_path):
    config = Config()
    config.train.deepspeed = str(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"train.deepspeed: .*none.json cannot be read \(No such file"):
        deepspeed_file.read(config.train)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"overlap_com": True}, "unknown key 'zero_optimization.overlap_com'; the nearest is 'overlap_comm'"),
        (
            {"stage3_prefetch_buckt_size": 1},
            "unknown key 'zero_optimization.stage3_prefetch_buckt_size'; the nearest is 'stage3_prefetch_bucket_size'",
        ),
        (
            {"offload_optimizer": {"device": "cpu", "pin_memry": True}},
            "unknown key 'zero_optimization.offload_optimizer.pin_memry'; the nearest is 'pin_memory'",
        ),
    ],
)
def test_an_unknown_key_of_zero_names_the_nearest(tmp_path, wrong, said):
    assert refused(tmp_path, zero=wrong) == said


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"steps_per_prnt": 3}, "unknown key 'steps_per_prnt'; the nearest is 'steps_per_print'"),
        ({"flops_profiler": {"enabld": True}}, "unknown key 'flops_profiler.enabld'; the nearest is 'enabled'"),
        ({"tensorboard": {"enabld": True}}, "unknown key 'tensorboard.enabld'; the nearest is 'enabled'"),
        ({"aio": {"blok_size": 1}}, "unknown key 'aio.blok_size'; the nearest is 'block_size'"),
    ],
)
def test_an_unknown_key_elsewhere_names_the_nearest(tmp_path, wrong, said):
    """DeepSpeed itself ignores most of them."""
    assert refused(tmp_path, **wrong) == said


@pytest.mark.parametrize("stage", [4, -1, "two", None, 1.5])
def test_an_unknown_stage_is_refused(tmp_path, stage):
    assert refused(tmp_path, stage).startswith("zero_optimization.stage: ")


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown: 'yes' is not true or false"),
        ({"steps_per_print": "often"}, "steps_per_print: 'often' is not a number"),
        ({"compile": True}, "compile: True is not a mapping"),
        ({"flops_profiler": 3}, "flops_profiler: 3 is of the wrong type"),
        ({"csv_monitor": {"enabled": 3.5}}, "csv_monitor.enabled: Input should be a valid boolean, is 3.5"),
        ({"zero": {"overlap_comm": "often"}}, "zero_optimization.overlap_comm: Input should be a valid boolean, "),
        ({"zero": {"reduce_bucket_size": -1}}, "zero_optimization.reduce_bucket_size: Input should be greater than 0, is -1"),
        ({"zero": {"offload_optimizer": "cpu"}}, "zero_optimization.offload_optimizer: Input should be a valid dictionary"),
        (
            {"zero": {"offload_optimizer": {"device": "gpu"}}},
            "zero_optimization.offload_optimizer.device: Input should be 'none', 'cpu' or 'nvme', is 'gpu'",
        ),
        ({"communication_data_type": "fp15"}, "Invalid communication_data_type. "),
        ({"stage": 3, "gradient_allreduce_op": "sum"}, "gradient_allreduce_op='sum' is not supported with ZeRO stage 3"),
    ],
)
def test_a_value_of_a_wrong_type_names_its_key(tmp_path, wrong, said):
    assert refused(tmp_path, **wrong).startswith(said)


@pytest.mark.parametrize(
    "stage, zero, said",
    [
        (0, {"offload_optimizer": {"device": "cpu"}}, "offload_optimizer: it has no effect at stage 0; set stage to 1, 2 or 3"),
        (2, {"offload_param": {"device": "cpu"}}, "offload_param: it has no effect at stage 2; set stage to 3"),
        (3, {"offload_optimizer": {"device": "nvme"}}, 'offload_optimizer.device: nvme is not supported; use "cpu"'),
        (3, {"offload_param": {"device": "nvme"}}, 'offload_param.device: nvme is not supported; use "cpu"'),
        (
            3,
            {"offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            "offload_optimizer.ratio: it works only with",
        ),
        (2, {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "Partial offloading only supported for ZeRO Stage 3"),
        (2, {"compute_grad_norm": False}, "compute_grad_norm: the norm is logged"),
    ],
)
def test_what_deepspeed_accepts_but_cannot_work_here_names_the_cure(tmp_path, stage, zero, said):
    message = refused(tmp_path, stage, zero)
    assert message.removeprefix("zero_optimization.").removeprefix("zero_optimization: ").startswith(said)


def test_what_the_training_does_not_use_is_refused(tmp_path):
    section = {"enabled": True, "data_sampling": {"enabled": False}, "data_routing": {"enabled": False}}
    assert refused(tmp_path, data_efficiency=section) == "data_efficiency: it has no effect in this training; leave it out"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloading_works_with_torchs_optimizers(tmp_path, stage):
    """By itself DeepSpeed refuses them, unless it is told not to."""
    settings = settings_of(tmp_path, stage, {"offload_optimizer": {"device": "cpu"}})
    assert settings["zero_force_ds_cpu_optimizer"] is False and settings["zero_allow_untested_optimizer"] is True
    assert 'set "zero_force_ds_cpu_optimizer": false' in refused(tmp_path, stage, zero_force_ds_cpu_optimizer=True)
    assert 'set "zero_allow_untested_optimizer": true' in refused(tmp_path, stage, zero_allow_untested_optimizer=False)


def test_sections_that_work_are_accepted(tmp_path):
    """As DeepSpeed's documentation shows them."""
    sections = {
        "steps_per_print": 10,
        "wall_clock_breakdown": True,
        "communication_data_type": "bf16",
        "gradient_predivide_factor": 2,
        "flops_profiler": {"enabled": True, "profile_step": 1, "module_depth": -1, "top_modules": 1, "detailed": True},
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None, "profile": False},
        "tensorboard": {"enabled": True, "output_path": "board", "job_name": "name"},
        "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "aio": {"block_size": 1048576, "queue_depth": 8, "single_submit": False, "overlap_events": True},
    }
    found = settings_of(tmp_path, 2, {"reduce_bucket_size": "auto", "allgather_bucket_size": 5e8}, **sections)
    assert found.items() >= sections.items()
