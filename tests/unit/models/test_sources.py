"""What `clip.pretrained` may name, what its source says of the weights, and contradictions between that and the recipe."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from weakclip import convert
from weakclip.checkpoints.clip_files import weights_file
from weakclip.config import ClipConfig, ConfigError
from weakclip.data.photometric import IMAGENET, NORMALISATIONS
from weakclip.models.clip import FrozenClip, open_clip

QUICK, GELU, TAG = "tiny-sources-quickgelu", "tiny-sources", "tiny_tag"
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


@pytest.fixture(scope="module", autouse=True)
def named(name_tiny_architectures) -> None:
    """The tiny architecture with QuickGELU and with GELU, under names of open_clip."""
    name_tiny_architectures(QUICK, GELU)


def load(pretrained: object, model: str | None = None) -> FrozenClip:
    return FrozenClip(ClipConfig(model=model, pretrained=str(pretrained), image_size=64), 8)


def same(a: FrozenClip, b: FrozenClip) -> bool:
    images_B3HW = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)) and (
        a.vision(images_B3HW).global_BE.equal(b.vision(images_B3HW).global_BE)
    )


# -------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "_orig_mod.module._orig_mod."]
)
def test_the_prefixes_of_compiled_and_parallel_modules_do_not_matter(tmp_path, make_tiny_clip, prefix):
    state = make_tiny_clip().state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"state_dict": {prefix + name: tensor for name, tensor in state.items()}}, tmp_path / "wrapped.pt")
    assert same(load(tmp_path / "plain.pt", QUICK), load(tmp_path / "wrapped.pt", QUICK))


def test_a_compiled_tower_within_a_clip_does_not_matter(tmp_path, make_tiny_clip):
    state = make_tiny_clip().state_dict()
    torch.save(state, tmp_path / "plain.pt")
    save_file(
        {name.replace("visual.", "visual._orig_mod."): tensor for name, tensor in state.items()}, tmp_path / "w.safetensors"
    )
    assert same(load(tmp_path / "plain.pt", QUICK), load(tmp_path / "w.safetensors", QUICK))


def test_a_custom_text_clip_of_plain_towers_is_a_clip(tmp_path, tiny_clip, make_tiny_clip):
    torch.save(make_tiny_clip().state_dict(), tmp_path / "plain.pt")
    architecture = json.loads((tiny_clip / "open_clip_config.json").read_text())["model_cfg"]
    torch.manual_seed(7)
    custom = open_clip.CustomTextCLIP(**architecture)
    custom.load_state_dict(open_clip.model.convert_to_custom_text_state_dict(make_tiny_clip().state_dict()))
    torch.save(custom.state_dict(), tmp_path / "custom.pt")
    assert same(load(tmp_path / "plain.pt", QUICK), load(tmp_path / "custom.pt", QUICK))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text.text_projection.weight": 1}, "is open_clip's CustomTextCLIP with a text projection that has a bias"),
        ({"text.transformer.embeddings.word_embeddings.weight": 1}, "CustomTextCLIP with a text tower of Hugging Face"),
        (
            {"visual.trunk.cls_token": 1, "text.ln_final.bias": 1},
            "with a vision tower of timm that is not supported, or not that",
        ),
        ({"text.cls_emb": 1}, "is open_clip's CoCa"),
        ({"visual.layer1.0.conv1.weight": 1}, "is a CLIP with a ResNet; only ViTs are supported"),
        ({"vision_model.head.probe": 1}, "is Hugging Face's SigLIP, whose attention pooling gives patches no joint"),
        ({"prompts_ND": 1}, "is the trained part of a WeakCLIP, without its CLIP; set clip.pretrained to the CLIP that it was"),
        ({"cls_token": 1, "patch_embed.proj.weight": 1}, "is a ViT of timm without a text tower"),
        ({"foreign": 1}, ".of no known format.: does not fit; missing keys .*; unexpected keys .1.: foreign"),
    ],
)
def test_the_format_of_another_model_is_named(tmp_path, changes, message):
    save_file({name: torch.zeros(size) for name, size in changes.items()}, tmp_path / "file.safetensors")
    with pytest.raises(ConfigError, match=f"^clip.pretrained: .*file.safetensors.*{message}"):
        load(tmp_path / "file.safetensors", QUICK)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, make_tiny_clip, value):
    state = make_tiny_clip().state_dict()
    state["visual.ln_post.bias"][3] = value
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(ConfigError, match="broken.pt .*: NaN or infinity in visual.ln_post.bias; its training diverged"):
        load(tmp_path / "broken.pt", QUICK)


# --------------------------------------------------------------------------------------------------------- activation


def test_openais_archive_needs_quick_gelu(tmp_path, make_tiny_clip, openai_archive, caplog):
    openai_archive(make_tiny_clip(), tmp_path / "openai.pt")
    assert load(tmp_path / "openai.pt", QUICK).trained_with == NORMALISATIONS["clip"]
    assert not caplog.records
    with pytest.raises(
        ConfigError, match=f"openai.pt was trained with QuickGELU, but {GELU} computes GELU; set clip.model to {QUICK}"
    ):
        load(tmp_path / "openai.pt", GELU)


def test_openais_converted_archive_is_still_openais(tmp_path, make_tiny_clip, openai_archive, caplog):
    openai_archive(make_tiny_clip(), tmp_path / "openai.pt")
    convert.main([str(tmp_path / "openai.pt"), str(tmp_path / "clip.safetensors")])
    assert load(tmp_path / "clip.safetensors", QUICK).trained_with == NORMALISATIONS["clip"] and not caplog.records
    with pytest.raises(ConfigError, match="clip.safetensors was trained with QuickGELU"):
        load(tmp_path / "clip.safetensors", GELU)


def test_an_archive_in_a_directory_that_says_gelu_is_refused(tmp_path, tiny_clip, make_tiny_clip, openai_archive):
    settings = json.loads((tiny_clip / "open_clip_config.json").read_text())
    settings["model_cfg"]["quick_gelu"] = False
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    openai_archive(make_tiny_clip(), tmp_path / "openai.pt")
    with pytest.raises(
        ConfigError, match='trained with QuickGELU, but its model_cfg computes GELU; set "quick_gelu" to true in it'
    ):
        load(tmp_path)


def test_unknown_weights_with_quick_gelu_are_one_warning(tmp_path, make_tiny_clip, caplog):
    torch.save(make_tiny_clip().state_dict(), tmp_path / "unknown.pt")
    with caplog.at_level(logging.WARNING):
        load(tmp_path / "unknown.pt", GELU)
        assert not caplog.records
        load(tmp_path / "unknown.pt", QUICK)
        load(tmp_path / "unknown.pt", QUICK)
    (message,) = caplog.messages
    assert "unknown.pt does not state its activation; clip.model=" in message and message.endswith(f"clip.model={GELU}")
    assert "\n" not in message


def test_the_warning_names_a_directory_that_states_the_activation(tmp_path, tiny_clip, caplog):
    for file in tiny_clip.iterdir():
        (tmp_path / file.name).symlink_to(file)
    load(tmp_path / "open_clip_model.safetensors", QUICK)
    assert caplog.messages[-1].endswith(f"; clip.pretrained={tmp_path} clip.model=null takes the one that this directory states")


def test_the_other_ranks_of_a_job_do_not_repeat_the_warning(tmp_path, make_tiny_clip, caplog, monkeypatch):
    torch.save(make_tiny_clip().state_dict(), tmp_path / "unknown.pt")
    monkeypatch.setenv("RANK", "3")
    with caplog.at_level(logging.WARNING):
        load(tmp_path / "unknown.pt", QUICK)
    assert not caplog.records


# ------------------------------------------------------------------------------------------------------ normalisation


@pytest.fixture
def stating(save_tiny_clip, tmp_path):
    """`stating(preprocess_cfg)`: a directory of open_clip's layout that states it."""

    def write(preprocessing: object) -> Path:
        settings = save_tiny_clip(tmp_path / "stating") / "open_clip_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"preprocess_cfg": preprocessing}))
        return settings.parent

    return write


OPENAI = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
TRAINED_WITH_IMAGENETS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize(
    "stated, choice, want",
    [
        (OPENAI, "imagenet", IMAGENET),  # as published
        (OPENAI, "clip", NORMALISATIONS["clip"]),
        (OPENAI, "source", NORMALISATIONS["clip"]),
        (TRAINED_WITH_IMAGENETS, "imagenet", IMAGENET),
        (TRAINED_WITH_IMAGENETS, "source", IMAGENET),
        (HALF, "source", ((127.5,) * 3, (127.5,) * 3)),
        ({}, "clip", NORMALISATIONS["clip"]),
        (None, "imagenet", IMAGENET),
    ],
)
def test_a_choice_that_the_source_does_not_contradict(stating, stated, choice, want):
    assert load(stating(stated)).normalisation("clip.normalisation", choice) == want


@pytest.mark.parametrize("stated, choice", [(HALF, "imagenet"), (HALF, "clip"), (TRAINED_WITH_IMAGENETS, "clip")])
def test_a_choice_that_the_source_contradicts_is_refused(stating, stated, choice):
    mean, std = (", ".join(map(str, stated[name])) for name in ("mean", "std"))
    message = f"cam.normalisation is {choice}, but clip.pretrained was trained with mean {mean} and std {std}; set .* to source"
    with pytest.raises(ConfigError, match=message):
        load(stating(stated)).normalisation("cam.normalisation", choice)


def test_a_network_that_was_trained_so_keeps_its_choice_with_a_warning(stating, caplog):
    clip = FrozenClip(ClipConfig(model=None, pretrained=str(stating(HALF)), image_size=64), prompts=4, strict=False)
    assert clip.normalisation("clip.normalisation", "imagenet") == IMAGENET
    (line,) = caplog.messages
    assert line.endswith("set clip.normalisation to source; it was trained so, and stays so")


def test_source_needs_a_source_that_states_it(tiny_clip):
    with pytest.raises(
        ConfigError, match="clip.normalisation: clip.pretrained does not state its mean and std; set .* imagenet or"
    ):
        load(tiny_clip).normalisation("clip.normalisation", "source")


@pytest.mark.parametrize("stated", [{"mean": [0.5]}, {"mean": [0.5] * 3}, {"mean": [0.5] * 3, "std": "wide"}, {"std": [1, 1]}])
def test_half_a_normalisation_is_refused(stating, stated):
    with pytest.raises(ConfigError, match="open_clip_config.json must state mean and std as three numbers each"):
        load(stating(stated))


def test_a_recipe_is_checked_where_the_model_is_built(stating, tiny_config):
    from weakclip.labels import class_names
    from weakclip.models.weakclip import WeakCLIP

    folder = stating(HALF)
    config = tiny_config(f"clip.pretrained={folder}")
    with pytest.raises(ConfigError, match="clip.normalisation is imagenet, but"):
        WeakCLIP(config, class_names(config.classes))
    config = tiny_config(f"clip.pretrained={folder}", "clip.normalisation=source")
    assert WeakCLIP(config, class_names(config.classes)).normalisation.mean == (127.5,) * 3


# -------------------------------------------------------------------------------------------------------- directories


@pytest.mark.parametrize("key", ["model_cfg", "preprocess_cfg"])
def test_metadata_that_is_no_settings_is_refused(tmp_path, make_tiny_clip, key):
    state = {name: tensor.contiguous() for name, tensor in make_tiny_clip().state_dict().items()}
    save_file(state, tmp_path / "odd.safetensors", {key: "[1]"})
    with pytest.raises(ConfigError, match="odd.safetensors: its metadata model_cfg and preprocess_cfg must be settings"):
        load(tmp_path / "odd.safetensors", QUICK)


def test_open_clips_weights_come_before_others_in_a_directory(tmp_path, tiny_clip):
    assert weights_file(tmp_path) is None
    for name in ("optimizer.pt", "training_args.bin", "pytorch_model.bin", "model.safetensors", "open_clip_model.safetensors"):
        (tmp_path / name).touch()
        if name != "training_args.bin":
            assert weights_file(tmp_path) == tmp_path / name


def test_one_of_several_files_of_weights_is_refused(tmp_path, tiny_clip):
    (tmp_path / "open_clip_config.json").symlink_to(tiny_clip / "open_clip_config.json")
    save_file(load_file(tiny_clip / "open_clip_model.safetensors"), tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(
        ConfigError, match="model-00001-of-00002.safetensors is one of several files of weights; save them as one"
    ):
        load(tmp_path)


@pytest.mark.parametrize("name", ["open_clip_config.json", "config.json"])
@pytest.mark.parametrize("text, message", [("{", "is not JSON"), ("[]", "holds a list instead of settings")])
def test_a_directory_with_a_damaged_config_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=f"clip.pretrained: .*{name} {message}"):
        load(tmp_path)
