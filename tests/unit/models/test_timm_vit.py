"""Plain ViTs of timm in a CLIP of open_clip: the same features as timm's own forward."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from weakclip.config import ClipConfig, ConfigError
from weakclip.models import timm_vit
from weakclip.models.architectures import build, named, open_clip
from weakclip.models.clip import FrozenClip, tokenize

SIZES = {"width": 64, "layers": 4, "head_width": 16, "mlp_ratio": 2.0, "patch_size": 16}
TEXT = {"context_length": 16, "width": 32, "heads": 2, "layers": 2}


def trunk(**changes: Any) -> Any:
    """A random EVA01 of these sizes; a new one's biases and projection are almost 0, which would hide a mistake."""
    from timm.models.eva import Eva

    torch.manual_seed(2)
    settings = {
        "img_size": 64,
        "patch_size": 16,
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "num_classes": 24,
    }
    model = Eva(**{**settings, "global_pool": "token", **changes}).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """`saved(trunk)`: a directory of open_clip's layout with that vision tower, and its text tower."""
    monkeypatch.setitem(timm_vit.PLAIN, "eva_for_tests", SIZES | {"no_ln_pre": True, "norm_kwargs": {"eps": 1e-6}})
    vision = {"timm_model_name": "eva_for_tests", "timm_pool": "token", "timm_proj": None, "image_size": 64}
    settings = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT, "custom_text": True}

    def save(model: Any) -> tuple[Any, Any]:
        text = open_clip.transformer.TextTransformer(output_dim=24, **TEXT).eval()
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
        state = {f"visual.trunk.{name}": tensor for name, tensor in model.state_dict().items()}
        state |= {f"text.{name}": tensor for name, tensor in text.state_dict().items()}
        torch.save(state | {"logit_scale": torch.tensor(3.0)}, tmp_path / "open_clip_pytorch_model.bin")
        return tmp_path, text

    return save


def load(folder: Any) -> FrozenClip:
    return FrozenClip(
        ClipConfig(model=None, pretrained=str(folder), image_size=64, name_tokens=16, double_class_embedding=False), 0
    )


def test_a_plain_vit_gives_the_features_of_timm(saved):
    theirs = trunk()
    folder, text = saved(theirs)
    ours, images_B3HW, names_KL = load(folder), torch.randn(2, 3, 64, 64), tokenize(["cat", "traffic light"], 16)
    with torch.no_grad():
        x_BLD, taps = theirs.forward_intermediates(images_B3HW, norm=False)
        joint_BLE, text_KE = theirs.head(x_BLD), text(names_KL)
        image_BE = theirs(images_B3HW)
    found = ours.vision(images_B3HW)
    for tap, want in zip(found.taps, taps, strict=True):
        torch.testing.assert_close(tap, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.global_BE, image_BE, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.visual_BEhw.flatten(2).mT, joint_BLE[:, 1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.text(names_KL, torch.zeros(0, 32)), text_KE, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rot_pos_emb": True, "swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False},  # EVA02
        {"scale_attn_inner": True},
        {"num_classes": 96},  # a projection to a larger space does not reach its bias
        {"global_pool": "avg"},
        {"init_values": 0.1},
    ],
)
def test_any_other_vit_of_timm_is_refused(saved, changes):
    folder, _ = saved(trunk(**changes))
    with pytest.raises(
        ConfigError, match="model.bin is a CLIP of open_clip with a vision tower of timm, which is not a plain ViT"
    ):
        load(folder)


@pytest.mark.parametrize("name", ["EVA01-g-14", "EVA01-g-14-plus"])
def test_eva01_has_the_sizes_that_timm_gives_it(name):
    import timm

    with torch.device("meta"):
        ours = build(named(name), "here")
        theirs = timm.create_model("eva_giant_patch14_224", num_classes=1024, global_pool="token")
    extra = {"conv1.bias": 1408, "proj.bias": 1024}  # what is folded into other parameters
    keys = sum(block.attn.q_bias.numel() for block in theirs.blocks)  # zeros, which timm does not store
    count = sum(parameter.numel() for parameter in ours.visual.parameters())
    assert count == sum(parameter.numel() for parameter in theirs.parameters()) - sum(extra.values()) + keys
    assert ours.visual.ln_post.eps == theirs.norm.eps and ours.visual.transformer.resblocks[0].attn.num_heads == 16
