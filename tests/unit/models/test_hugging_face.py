"""Hugging Face's CLIPs: the same features as transformers' own forward, from a directory and from a file alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weakclip.config import ClipConfig, ConfigError
from weakclip.models import hugging_face
from weakclip.models.clip import FrozenClip, open_clip, tokenize

TEXT = {"hidden_size": 32, "intermediate_size": 136, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"max_position_embeddings": 16, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0}
VISION = {"hidden_size": 64, "intermediate_size": 200, "num_hidden_layers": 4, "num_attention_heads": 4}
VISION |= {"image_size": 64, "patch_size": 16}
NAMES_KL = tokenize(["cat", "traffic light", "background"], 5)


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def theirs(request, tmp_path_factory):
    """A random CLIPModel and the directory that transformers saves it to."""
    import transformers

    config = transformers.CLIPConfig(
        text_config=TEXT | {"hidden_act": request.param}, vision_config=VISION | {"hidden_act": request.param}, projection_dim=24
    )
    torch.manual_seed(3)
    model = transformers.CLIPModel(config).eval()
    for parameter in model.parameters():  # biases and norms are 0 and 1 in a new model, which would hide a mistake
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("hugging_face") / request.param
    model.save_pretrained(folder)
    return model, folder


def load(path: Path, model: str | None = None) -> FrozenClip:
    return FrozenClip(ClipConfig(model=model, pretrained=str(path), image_size=64, double_class_embedding=False), 0)


def assert_same_features(ours: FrozenClip, theirs) -> None:
    images_B3HW = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        vision = theirs.vision_model(pixel_values=images_B3HW, output_hidden_states=True)
        text = theirs.text_model(input_ids=NAMES_KL)
        image_BE, text_KE = theirs.visual_projection(vision.pooler_output), theirs.text_projection(text.pooler_output)
    found = ours.vision(images_B3HW)
    for tap, tokens_BLD in zip(found.taps, vision.hidden_states[1:], strict=True):
        torch.testing.assert_close(tap.flatten(2).mT, tokens_BLD[:, 1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.global_BE, image_BE, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.text(NAMES_KL, torch.zeros(0, 32)), text_KE, rtol=1e-5, atol=1e-5)
    assert ours.logit_scale == theirs.logit_scale.exp()


def test_a_directory_gives_the_features_of_transformers(theirs):
    model, folder = theirs
    ours = load(folder)
    assert ours.architecture["quick_gelu"] == (folder.name == "quick_gelu") and ours.trained_with is None
    assert_same_features(ours, model)


def test_a_file_alone_takes_its_architecture_from_clip_model(theirs, tmp_path):
    model, folder = theirs
    architecture = hugging_face.architecture(json.loads((folder / "config.json").read_text()), "config.json")
    (tmp_path / f"{folder.name}-for-tests.json").write_text(json.dumps(architecture))
    open_clip.add_model_config(tmp_path / f"{folder.name}-for-tests.json")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same_features(load(tmp_path / "pytorch_model.bin", f"{folder.name}-for-tests"), model)


def test_what_config_json_leaves_out_has_transformers_defaults():
    import transformers

    theirs = transformers.CLIPConfig().to_dict()
    whole = {"model_type": "clip", "projection_dim": theirs["projection_dim"]}
    whole |= {tower: theirs[tower] for tower in ("text_config", "vision_config")}
    short = {"model_type": "clip", "text_config": {}, "vision_config": None}
    assert hugging_face.architecture(short, "here") == hugging_face.architecture(whole, "here")


@pytest.mark.parametrize(
    "vision, text",
    [
        ({"hidden_size": "768"}, {}),
        ({"num_attention_heads": 0}, {}),
        ({}, ["text"]),
        ({"intermediate_size": "x"}, {}),
        ({}, {"hidden_act": []}),
    ],
)
def test_settings_of_other_types_are_refused(vision, text):
    with pytest.raises(ConfigError, match="^here"):
        hugging_face.architecture({"model_type": "clip", "vision_config": vision or {"x": 1}, "text_config": text}, "here")


def test_the_preprocessor_states_the_normalisation(theirs, tmp_path):
    _, folder = theirs
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    for settings, want in (
        ({"image_mean": [0.4815, 0.4578, 0.4082], "image_std": [0.2686, 0.2613, 0.2758]}, [122.77, 116.75, 104.09]),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, [127.5] * 3),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": False}, [0] * 3),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        assert load(tmp_path).normalisation("clip.normalisation", "source").mean == pytest.approx(want, abs=0.01)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "siglip"}, "config.json is of a 'siglip' model; only a CLIPModel .clip. is supported"),
        ({"vision_config": {"hidden_act": "gelu"}}, "config.json: hidden_act is gelu and quick_gelu; both towers need"),
        (
            {"vision_config": {"hidden_act": "gelu_new"}, "text_config": {"hidden_act": "gelu_new"}},
            "config.json: hidden_act is gelu_new; both towers need quick_gelu, or gelu",
        ),
        ({"vision_config": {"patch_size": 32}}, "config.json: patch 32 is not supported"),
        ({"text_config": {"vocab_size": 99}}, "config.json: only .*: its text tower has 99 tokens, not CLIP's"),
    ],
)
def test_other_models_and_settings_are_refused(tmp_path, changes, message):
    settings = {"model_type": "clip", "text_config": {}, "vision_config": {"patch_size": 16}} | changes
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file({hugging_face.MARK: torch.zeros(4)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=f"clip.pretrained: .*{message}"):
        load(tmp_path)


def test_weights_that_do_not_fit_are_named_as_hugging_faces(theirs, tmp_path):
    model, folder = theirs
    (tmp_path / "config.json").symlink_to(folder / "config.json")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("text_model.")}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="model.safetensors .Hugging Face's CLIPModel.: does not fit; missing keys .28.: "):
        load(tmp_path)
