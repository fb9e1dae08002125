"""The frozen towers: every format of their weights, refused files, and the same numbers as open_clip's own forward."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from weakclip.config import ClipConfig, ConfigError
from weakclip.models.clip import FrozenClip, open_clip, tokenize

NAME = "tiny-for-tests"
NAMES_KL = tokenize(["background", "cat", "traffic light"], 5)


@pytest.fixture(scope="module")
def named(tmp_path_factory, tiny_clip) -> str:
    """open_clip's name of the tiny architecture."""
    file = tmp_path_factory.mktemp("architectures") / f"{NAME}.json"
    file.write_text(json.dumps(json.loads((tiny_clip / "open_clip_config.json").read_text())["model_cfg"]))
    open_clip.add_model_config(file)
    return NAME


def config(pretrained, model: str | None = None, **changes) -> ClipConfig:
    return ClipConfig(model=model, pretrained=str(pretrained), image_size=64, **changes)


def features(clip: FrozenClip) -> list[torch.Tensor]:
    torch.manual_seed(1)
    vision = clip.vision(torch.randn(2, 3, 64, 96))
    return [*vision.taps, vision.global_BE, vision.visual_BEhw, clip.text(NAMES_KL, torch.randn(8, 32))]


# ------------------------------------------------------------------------------------------------------------ loading


def test_archive_checkpoint_and_directory_give_the_same_features(tmp_path, named, tiny_clip, make_tiny_clip, openai_archive):
    clip = make_tiny_clip()
    for parameter in clip.parameters():
        parameter.data = parameter.data.half().float()  # so that fp16 in the archive is exact
    openai_archive(clip, tmp_path / "openai.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, tmp_path / "train.pt")
    torch.save(clip.state_dict(), tmp_path / "plain.pt")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "open_clip_config.json").write_bytes((tiny_clip / "open_clip_config.json").read_bytes())
    torch.save(clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    sources = [(tmp_path / f"{kind}.pt", named) for kind in ("openai", "train", "plain")] + [(folder, None)]
    first, *others = (features(FrozenClip(config(path, model), 8)) for path, model in sources)
    for other in others:
        assert all(a.equal(b) for a, b in zip(first, other, strict=True))
    assert first[0].dtype == torch.float32


def test_a_small_vocabulary_gives_the_same_text_features_as_all_of_it(tmp_path, named, tiny_clip, make_tiny_clip):
    torch.save(make_tiny_clip().state_dict(), tmp_path / "whole.pt")
    small, whole = FrozenClip(config(tiny_clip), 8), FrozenClip(config(tmp_path / "whole.pt", named), 8)
    assert all(a.equal(b) for a, b in zip(features(small), features(whole), strict=True))


def test_none_is_the_only_random_start(named):
    torch.manual_seed(0)
    assert len(features(FrozenClip(config("none", named), 8))) == 7


@pytest.mark.parametrize(
    "model, message",
    [
        (NAME, "nowhere.pt does not exist; OpenAI's archive of this model is at an open_clip release"),
        ("ViT-B-16-quickgelu", "nowhere.pt does not exist; OpenAI's archive of this model is at https://.*ViT-B-16.pt"),
    ],
)
def test_a_missing_file_says_where_to_get_it(named, tmp_path, model, message):
    with pytest.raises(ConfigError, match=f"clip.pretrained: .*{message}"):
        FrozenClip(config(tmp_path / "nowhere.pt", model), 8)


def damaged_files(folder: Path, clip: nn.Module, openai_archive: Callable[..., None]) -> dict[str, Path]:
    files = {name: folder / name for name in ("jit.pt", "zip.pt", "half.safetensors", "text.pt", "empty.pt", "other_zip.pt")}
    openai_archive(clip, files["jit.pt"])
    torch.save(clip.state_dict(), files["zip.pt"])
    for name in ("jit.pt", "zip.pt"):
        files[name].write_bytes(files[name].read_bytes()[: files[name].stat().st_size // 2])
    files["half.safetensors"].write_bytes((folder / "zip.pt").read_bytes()[:1000])
    files["text.pt"].write_text("<!DOCTYPE html><html>Not found</html>")
    files["empty.pt"].write_bytes(b"")
    with zipfile.ZipFile(files["other_zip.pt"], "w") as archive:
        archive.writestr("readme.txt", "no weights")
    return files


def test_damaged_files_are_one_clear_error_each(tmp_path, named, make_tiny_clip, openai_archive):
    for name, path in damaged_files(tmp_path, make_tiny_clip(), openai_archive).items():
        with pytest.raises(ConfigError, match=f"clip.pretrained: .*{name}: .") as caught:
            FrozenClip(config(path, named), 8)
        assert "\n" not in str(caught.value)


def test_a_pickle_of_anything_but_weights_is_not_loaded(tmp_path, named):
    torch.save({"state_dict": {"visual.proj": Path("run me")}}, tmp_path / "pickle.pt")
    with pytest.raises(ConfigError, match="clip.pretrained: .*pickle.pt"):
        FrozenClip(config(tmp_path / "pickle.pt", named), 8)


@pytest.mark.parametrize("content", [{"epoch": 3}, {"state_dict": None}, [1, 2], {"visual.proj": torch.zeros(3)}, torch.zeros(3)])
def test_a_file_of_other_content_is_refused(tmp_path, named, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="clip.pretrained: .*other.pt"):
        FrozenClip(config(tmp_path / "other.pt", named), 8)


def test_weights_of_another_architecture_are_refused(tmp_path, named, make_tiny_clip):
    torch.save(make_tiny_clip(layers=3).state_dict(), tmp_path / "shallow.pt")
    with pytest.raises(
        ConfigError,
        match="shallow.pt .open_clip's CLIP.: does not fit; missing keys .12.: visual.*blocks.3.* and 2 more; set clip.model",
    ):
        FrozenClip(config(tmp_path / "shallow.pt", named), 8)


def test_a_directory_and_a_model_name_exclude_each_other(tiny_clip, named):
    with pytest.raises(ConfigError, match="clip.model must be null when clip.pretrained is .*tiny: it states its own"):
        FrozenClip(config(tiny_clip, named), 8)


def test_a_directory_needs_its_config_and_weights(tmp_path, tiny_clip):
    with pytest.raises(ConfigError, match="holds no open_clip_config.json"):
        FrozenClip(config(tmp_path), 8)
    (tmp_path / "open_clip_config.json").write_bytes((tiny_clip / "open_clip_config.json").read_bytes())
    with pytest.raises(ConfigError, match="holds no weights"):
        FrozenClip(config(tmp_path), 8)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_cfg": {"embed_dim": 8}}'])
def test_a_directory_whose_config_is_none_is_refused(tmp_path, make_tiny_clip, text):
    (tmp_path / "open_clip_config.json").write_text(text)
    torch.save(make_tiny_clip().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match="open_clip_config.json"):
        FrozenClip(config(tmp_path), 8)


@pytest.mark.parametrize(
    "model, message",
    [
        (None, "open_clip has no model None"),
        ("ViT-B-61", "open_clip has no model 'ViT-B-61'"),
        ("ViT-B-32", "patch 32 is not supported; use a ViT with patch 14 or 16"),
        ("RN50", "only CLIPs with a ViT"),
        ("ViT-B-16-SigLIP", "only CLIPs with a ViT"),
        ("roberta-ViT-B-32", "only CLIPs with a ViT"),
        ("coca_ViT-L-14", "only CLIPs with a ViT"),
        (
            "ViT-L-14-CLIPA",
            "only .*: its vision tower pools its patches .avg. .*; its text tower has the tokenizer bert",
        ),
        ("ViT-H-14-worldwide", "only .* are supported: its text tower has the tokenizer facebook/xlm-v-base, not CLIP's"),
        ("ViTamin-B", "only .* are supported: its vision tower is timm's vitamin_base_224, which is not a plain ViT"),
        ("MobileCLIP-S1", "only .*: its vision tower is timm's fastvit_mci1, .*; its text tower is not causal, so that padding"),
    ],
)
def test_an_architecture_that_cannot_be_used_is_named(model, message):
    with pytest.raises(ConfigError, match=f"clip.model: {message}"):
        FrozenClip(config("none", model), 8)


def test_image_sizes_and_lengths_that_do_not_fit_are_refused(tiny_clip):
    with pytest.raises(ConfigError, match="clip.image_size is 70; it must be a multiple of the patch, 16"):
        FrozenClip(ClipConfig(model=None, pretrained=str(tiny_clip), image_size=70), 8)
    with pytest.raises(ConfigError, match="clip.name_tokens . prompts.length, .* has 17 tokens, .* at most 16"):
        FrozenClip(config(tiny_clip), 12)


# ------------------------------------------------------------------------------------------------------ vision tower


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (16, 160), (128, 80)])
def test_the_vision_tower_equals_open_clips(tiny_clip, make_tiny_clip, size):
    tower = FrozenClip(config(tiny_clip, double_class_embedding=False), 8).vision
    reference = make_tiny_clip().visual
    h, w = size[0] // 16, size[1] // 16
    positions = reference.positional_embedding.detach()
    grid = positions[1:].reshape(1, 4, 4, 64).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(h, w), mode="bilinear", align_corners=False).permute(0, 2, 3, 1).reshape(h * w, 64)
    reference.positional_embedding = nn.Parameter(torch.cat([positions[:1], grid]))
    images_B3HW = torch.randn(2, 3, *size)
    with torch.no_grad():
        want = reference.forward_intermediates(images_B3HW, indices=list(tower.taps))
    got = tower(images_B3HW)
    assert [tap.shape for tap in got.taps] == [(2, 64, h, w)] * 4 and got.visual_BEhw.shape == (2, 32, h, w)
    for tap, wanted in zip(got.taps, want["image_intermediates"], strict=True):
        torch.testing.assert_close(tap, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.global_BE, want["image_features"], rtol=1e-4, atol=1e-5)
    last_BLD = got.taps[-1].flatten(2).transpose(1, 2)
    visual_BEhw = (reference.ln_post(last_BLD) @ reference.proj).transpose(1, 2).unflatten(2, (h, w))
    torch.testing.assert_close(got.visual_BEhw, visual_BEhw, rtol=1e-4, atol=1e-5)


def test_the_class_embedding_enters_twice_unless_told_otherwise(tiny_clip, make_tiny_clip):
    embedding_D = make_tiny_clip().visual.class_embedding
    for double, factor in ((True, 2), (False, 1)):
        tower = FrozenClip(config(tiny_clip, double_class_embedding=double), 8).vision
        assert tower.class_embedding.equal(factor * embedding_D)


@pytest.mark.parametrize(
    "model, image_size, taps",
    [
        ("ViT-B-16-quickgelu", 512, (3, 5, 7, 11)),
        ("ViT-L-14-quickgelu", 504, (7, 11, 15, 23)),
        ("ViT-H-14", 224, (10, 15, 20, 31)),
    ],
)
def test_taps_and_grid_follow_depth_and_patch(model, image_size, taps):
    with torch.device("meta"):
        tower = FrozenClip(ClipConfig(model=model, pretrained="none", image_size=image_size), 8).vision
    assert tower.taps == taps
    assert tower.positional_embedding.shape == ((image_size // tower.patch) ** 2 + 1, tower.width)


def test_the_taps_of_four_blocks_are_all_of_them(tiny_clip):
    assert FrozenClip(config(tiny_clip), 8).vision.taps == (0, 1, 2, 3)


def test_taps_can_be_chosen(tiny_clip):
    images_B3HW = torch.randn(1, 3, 64, 64)
    usual, chosen = (FrozenClip(config(tiny_clip, taps=taps), 8).vision for taps in (None, [0, 0, 2, 3]))
    assert chosen(images_B3HW).taps[1].equal(usual(images_B3HW).taps[0])
    with pytest.raises(ConfigError, match=r"clip.taps is \[0, 1, 2, 4\], but this vision tower has blocks 0..3"):
        FrozenClip(config(tiny_clip, taps=[0, 1, 2, 4]), 8)


def test_stochastic_depth_acts_when_asked_for_and_is_linear_over_the_blocks(tiny_clip):
    tower = FrozenClip(config(tiny_clip, drop_path=0.6), 8).vision
    images_B3HW = torch.randn(1, 3, 64, 64).expand(64, -1, -1, -1)
    assert tower.drop_paths == pytest.approx((0, 0.2, 0.4, 0.6))
    still, moved = tower(images_B3HW), tower(images_B3HW, drop_path=True)
    assert still.taps[3].equal(tower(images_B3HW).taps[3])
    torch.testing.assert_close(moved.taps[0], still.taps[0])  # the first block is never dropped
    assert all(len(tap.flatten(1).unique(dim=0)) > 1 for tap in moved.taps[1:])
    # Whole branches are dropped per sample: attention and MLP each are present or not.
    assert len(moved.taps[1].flatten(1).unique(dim=0)) <= 4


def test_nothing_of_the_frozen_part_needs_or_carries_a_gradient(tiny_clip):
    clip = FrozenClip(config(tiny_clip), 8)
    assert not any(parameter.requires_grad for parameter in clip.parameters()) and not clip.training
    found = clip.vision(torch.randn(1, 3, 64, 64))
    assert all(not t.requires_grad and t.grad_fn is None for t in (*found.taps, found.global_BE, found.visual_BEhw))


# -------------------------------------------------------------------------------------------------------- text tower


def test_prompts_equal_to_a_sentences_embeddings_give_open_clips_text_features(tiny_clip, make_tiny_clip):
    """[start] photo [end] with the words' own embeddings as prompts is what open_clip makes of the sentence."""
    clip, reference = FrozenClip(config(tiny_clip), 1), make_tiny_clip()
    prompt, name = tokenize(["bird"], 3)[0, 1], tokenize(["cat", "dog"], 5)
    sentences = torch.zeros(2, 16, dtype=torch.int64)
    sentences[:, 0], sentences[:, 1], sentences[:, 2:6] = name[:, 0], prompt, name[:, 1:]
    with torch.no_grad():
        want = reference.encode_text(sentences)
        torch.testing.assert_close(clip.text(name, reference.token_embedding(prompt)[None]), want, rtol=1e-4, atol=1e-5)


def test_the_gradient_reaches_the_prompts_and_nothing_frozen(tiny_clip):
    clip = FrozenClip(config(tiny_clip), 8)
    prompts_ND = torch.randn(8, 32, requires_grad=True)
    clip.text(NAMES_KL, prompts_ND).square().sum().backward()
    assert (prompts_ND.grad.abs().sum(1) > 0).all()
    assert all(parameter.grad is None for parameter in clip.parameters())


def test_names_are_told_apart_and_padding_after_the_end_has_no_effect(tiny_clip):
    clip = FrozenClip(config(tiny_clip), 8)
    prompts_ND = torch.randn(8, 32)
    short, long = clip.text(tokenize(["cat", "dog"], 3), prompts_ND), clip.text(tokenize(["cat", "dog"], 5), prompts_ND)
    torch.testing.assert_close(short, long)
    assert not short[0].allclose(short[1], atol=1e-3)
