"""ViTs of timm in a CLIP of open_clip: the same features as timm's own forward, and all that is done with other CLIPs."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from weakclip import labels
from weakclip.cams import gradcam
from weakclip.config import CamConfig, ClipConfig, ConfigError
from weakclip.models import released, timm_vit
from weakclip.models.architectures import build, named, open_clip
from weakclip.models.clip import FrozenClip, tokenize
from weakclip.models.load import load_weakclip
from weakclip.models.weakclip import WeakCLIP
from weakclip.recipe import load as load_recipe

SIZES = {"width": 64, "layers": 4, "head_width": 16, "mlp_ratio": 2.0, "patch_size": 16}
TEXT = {"context_length": 16, "width": 32, "heads": 2, "layers": 2}

EVA02 = {"use_rot_pos_emb": True, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True, "qkv_fused": False}
MODELS = {
    "eva_giant_patch14_224": {},
    "eva02_base_patch16_clip_224": EVA02 | {"ref_feat_shape": 16},
    "eva02_enormous_patch14_clip_224": {"use_post_norm": True},
    "vit_base_mci_224": None,
}
"""What distinguishes these models of timm from the first."""

PLAIN, ROTARY, POST_NORM, CONV_STEM = MODELS


def trunk(name: str = PLAIN, **changes: Any) -> Any:
    """A random one of tiny size; a new one's biases and projection are almost 0, which would hide a mistake."""
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer
    from timm.models.vision_transformer_hybrid import ConvStem, HybridEmbed

    torch.manual_seed(2)
    settings = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0}
    settings |= {"num_classes": 24, "global_pool": "token"}
    if name == CONV_STEM:
        convolutions = {"channels": (16, 16, 64), "stride": (4, 2, 2), "kernel_size": (4, 2, 2), "padding": 0}
        backbone = ConvStem(**convolutions, act_layer=nn.GELU)
        stem = {"embed_layer": partial(HybridEmbed, backbone=backbone, proj=False), "no_embed_class": True}
        model = VisionTransformer(**settings | stem | {"patch_size": 1} | changes)
    else:
        model = Eva(**settings | MODELS[name] | changes)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for buffer in (buffer for key, buffer in model.named_buffers() if ".bn.running_" in key):
        buffer.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """`saved(trunk, name)`: a directory of open_clip's layout with that vision tower of kind `name`, and its text tower."""

    def save(model: Any, name: str = PLAIN) -> tuple[Path, Any]:
        kind = timm_vit.TRUNKS[name]
        monkeypatch.setitem(timm_vit.TRUNKS, name, kind._replace(settings=kind.settings | SIZES))
        vision = {"timm_model_name": name, "timm_pool": "token", "timm_proj": None, "image_size": 64}
        settings = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT, "custom_text": True}
        text = open_clip.transformer.TextTransformer(output_dim=24, **TEXT).eval()
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
        state = {f"visual.trunk.{key}": tensor for key, tensor in model.state_dict().items()}
        state |= {f"text.{key}": tensor for key, tensor in text.state_dict().items()}
        torch.save(state | {"logit_scale": torch.tensor(3.0)}, tmp_path / "open_clip_pytorch_model.bin")
        return tmp_path, text

    return save


def load(folder: Path, image_size: int = 64, **options: Any) -> FrozenClip:
    options = {"name_tokens": 16, "double_class_embedding": False} | options
    return FrozenClip(ClipConfig(model=None, pretrained=str(folder), image_size=image_size, **options), 0)


def check_features(ours: FrozenClip, theirs: Any, images_B3HW: torch.Tensor) -> None:
    """Compare in fp64; norms after attention enlarge the rounding of fp32, for which docs/weights.md has the differences."""
    ours, theirs, images_B3HW = ours.double(), theirs.double(), images_B3HW.double()
    with torch.no_grad():
        x_BLD, taps = theirs.forward_intermediates(images_B3HW, norm=False)
        joint_BLE, image_BE = theirs.head(x_BLD), theirs(images_B3HW)
    found = ours.vision(images_B3HW)
    for tap, want in zip(found.taps, taps, strict=True):
        torch.testing.assert_close(tap, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.global_BE, image_BE, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.visual_BEhw.flatten(2).mT, joint_BLE[:, 1:], rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ features


@pytest.mark.parametrize("name", MODELS)
def test_a_vit_gives_the_features_of_timm(saved, name):
    theirs = trunk(name)
    folder, text = saved(theirs, name)
    ours, names_KL = load(folder), tokenize(["cat", "traffic light"], 16)
    torch.testing.assert_close(ours.text(names_KL, torch.zeros(0, 32)), text(names_KL), rtol=1e-5, atol=1e-5)
    check_features(ours, theirs, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("size", [(64, 96), (160, 32)])
def test_rotary_positions_are_stretched_over_other_grids_as_by_timm(saved, size):
    """timm resizes the position embedding by another interpolation, so all patches have the same one here."""
    theirs = trunk(ROTARY, dynamic_img_size=True)
    theirs.pos_embed.data[:, 1:] = theirs.pos_embed.data[:, 1:2]
    folder, _ = saved(theirs, ROTARY)
    for image_size in (64, 128):
        check_features(load(folder, image_size), theirs, torch.randn(1, 3, *size))


@pytest.mark.parametrize("name", MODELS)
def test_stochastic_depth_drops_the_branches_of_whole_samples(saved, name):
    clip = load(saved(trunk(name), name)[0], drop_path=0.5)
    images_B3HW = torch.randn(1, 3, 64, 64).expand(8, 3, 64, 64)
    calm, dropped = (clip.vision(images_B3HW, drop_path=on).global_BE for on in (False, True))
    torch.testing.assert_close(calm, calm[:1].expand_as(calm), rtol=1e-5, atol=1e-5)
    assert (dropped - dropped[:1]).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------------- CAMs


@pytest.mark.parametrize("name", MODELS)
def test_cams_have_the_tower_s_own_attention_and_tokens(saved, name):
    theirs = trunk(name)
    clip, image_13HW, weights, inputs = load(saved(theirs, name)[0]), torch.randn(1, 3, 64, 64), [], []
    for block in theirs.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, given, output: weights.append(output[0].mean(0)))
        block.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    with torch.no_grad():
        theirs(image_13HW)
    before = gradcam.before_last_block(clip.vision, image_13HW, 2)
    torch.testing.assert_close(before.tokens_1TD, inputs[-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(before.attention_LL, torch.stack(weights[-2:]).mean(0)[1:, 1:], rtol=1e-5, atol=1e-5)
    end_1TD = clip.vision(image_13HW).visual_BEhw.flatten(2)[0].mean(1)
    normed_1TD = clip.vision.blocks[-1].ln_1(before.tokens_1TD)
    torch.testing.assert_close(gradcam.pooled(clip.vision, before, normed_1TD), F.normalize(end_1TD, dim=0), rtol=1e-4, atol=1e-5)
    maps_nhw = gradcam.maps_at_one_size(clip, image_13HW, F.normalize(torch.randn(3, 24), dim=1), 2, CamConfig())
    assert maps_nhw.shape == (2, 4, 4) and maps_nhw.amax((1, 2)).tolist() == [1, 1]


# ----------------------------------------------------------------------------------------------- training, converting


@pytest.mark.parametrize("name", MODELS)
def test_a_weakclip_on_it_trains_and_is_converted(saved, name, tiny_recipe, tmp_path):
    folder, _ = saved(trunk(name), name)
    config = load_recipe(tiny_recipe, [f"clip.pretrained={folder}", "clip.image_size=96"])
    model = WeakCLIP(config, labels.class_names(config.classes)).train()
    output = model(torch.randn(2, 3, 64, 96))
    (output.logits_BKhw.square().mean() + output.scores_BKhw.square().mean()).backward()
    assert model.prompts_ND.grad.abs().sum() > 0 and all(p.grad is None for p in model.clip.parameters())

    meta = released.metadata(model.clip.architecture, True, labels.class_names(config.classes), ())
    checkpoint = released.Checkpoint(released.of_model(model), meta)
    released.write(checkpoint, tmp_path / "ours.safetensors")
    again = load_weakclip(replace(config, clip=replace(config.clip, pretrained="none")), tmp_path / "ours.safetensors").cpu()
    images_B3HW = torch.randn(1, 3, 64, 64)
    assert again(images_B3HW).logits_BKhw.equal(model.eval()(images_B3HW).logits_BKhw)
    with pytest.raises(ConfigError, match=f"ours.pth: the released layout cannot hold timm's {name}; write it as .safetensors"):
        released.write(checkpoint, tmp_path / "ours.pth")


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": 96},  # a projection to a larger space does not reach its bias
        {"global_pool": "avg"},
        {"init_values": 0.1},
        {"num_reg_tokens": 2},
        {"attn_type": "rope", "use_rot_pos_emb": True, "qk_norm": True},
    ],
)
def test_any_other_vit_of_timm_is_refused(saved, changes):
    folder, _ = saved(trunk(**changes))
    with pytest.raises(ConfigError, match="model.bin is a CLIP of open_clip with a vision tower of timm that is not supported"):
        load(folder)


@pytest.mark.parametrize(
    "name, lost",
    [(PLAIN, "cls_token"), (ROTARY, "blocks.1.attn.v_proj.bias"), (CONV_STEM, "patch_embed.backbone.0.bn.running_mean")],
)
def test_a_tower_without_a_tensor_that_others_need_is_refused(saved, name, lost):
    folder, _ = saved(trunk(name), name)
    state = torch.load(folder / "open_clip_pytorch_model.bin")
    del state[f"visual.trunk.{lost}"]
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(ConfigError, match="model.bin is a CLIP of open_clip with a vision tower of timm that is not supported"):
        load(folder)


@pytest.mark.parametrize("name, other", [(PLAIN, ROTARY), (ROTARY, PLAIN), (POST_NORM, ROTARY), (PLAIN, CONV_STEM)])
def test_weights_of_another_supported_one_do_not_fit(saved, name, other):
    folder, _ = saved(trunk(other), name)
    with pytest.raises(ConfigError, match="with a ViT of timm.: does not fit; .*; set clip.model to the arch"):
        load(folder)


def test_the_architecture_must_have_the_tower_of_timm(saved):
    folder, _ = saved(trunk(ROTARY), ROTARY)
    weights = folder / "open_clip_pytorch_model.bin"
    with pytest.raises(ConfigError, match="a vision tower of timm that is not supported, or not that of the architecture"):
        FrozenClip(ClipConfig(model="ViT-B-16", pretrained=str(weights)), 0)


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", ["EVA01-g-14", "EVA02-B-16", "EVA02-L-14", "EVA02-L-14-336", "EVA02-E-14", "MobileCLIP-B"])
def test_it_has_the_sizes_that_timm_gives_it(monkeypatch, name):
    from timm import create_model

    architecture = named(name)
    model = architecture["vision_cfg"]["timm_model_name"]
    create = partial(create_model, model, num_classes=architecture["embed_dim"], global_pool="token")
    with torch.device("meta"):
        depth = len(create().blocks)
    kind, theirs = timm_vit.TRUNKS[model], create(depth=1)
    assert kind.settings["layers"] == depth
    monkeypatch.setitem(timm_vit.TRUNKS, model, kind._replace(settings=kind.settings | {"layers": 1}))
    with torch.device("meta"):
        ours = build(architecture, "here").visual
    state = timm_vit.to_open_clip(theirs.state_dict(), kind)
    assert {key: tensor.shape for key, tensor in state.items()} == {
        key: tensor.shape for key, tensor in ours.state_dict().items()
    }
    assert ours.ln_post.eps == theirs.norm.eps and ours.transformer.resblocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads
    side = theirs.rope.ref_feat_shape[0] if getattr(theirs, "rope", None) else None
    assert ours.rotary_side == side
