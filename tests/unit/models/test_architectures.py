"""Which architectures of open_clip are supported: all that differ from a plain CLIP in size alone."""

from __future__ import annotations

import re

import pytest

from weakclip.config import ConfigError
from weakclip.models.architectures import check, named, open_clip, refusals, sibling

PLAIN = {"embed_dim": 8, "vision_cfg": {"patch_size": 16}, "text_cfg": {}}


def test_each_model_of_open_clip_is_supported_or_refused_with_a_reason():
    supported = {name for name in open_clip.list_models() if not list(refusals(named(name)))}
    assert {"ViT-B-16", "ViT-L-14-336-quickgelu", "ViT-bigG-14", "ViT-M-16-alt", "ViT-B-32"} <= supported
    others = set(open_clip.list_models()) - supported
    assert {"RN50", "coca_ViT-L-14", "ViT-B-16-SigLIP", "MobileCLIP2-L-14", "PE-Core-B-16", "ViT-H-14-CLIPA"} <= others
    of_timm = {name for name in supported if named(name)["vision_cfg"].get("timm_model_name")}
    eva02 = {f"EVA02-{size}" for size in ("B-16", "L-14", "L-14-336", "E-14", "E-14-plus")}
    assert of_timm == {"EVA01-g-14", "EVA01-g-14-plus", "MobileCLIP-B", "MobileCLIP2-B", *eva02}


def test_the_table_in_the_docs_is_that_of_these_models(repo):
    rows = re.findall(r"^\| (\S+) \| (.*) \|$", (repo / "docs/weights.md").read_text(), re.MULTILINE)
    said = {name: text for name, text in rows if name in open_clip.list_models()}
    assert len(said) > 100
    for name, text in said.items():
        try:
            check(named(name), "here")
        except ConfigError as error:
            assert str(error).endswith(text)
        else:
            differences = re.fullmatch(r"supported; (\S+), (\S+), (\S+), (\S+)", text)
            assert differences and max(map(float, differences.groups())) < 1e-5


@pytest.mark.parametrize(
    "tower, setting, value, reason",
    [
        ("vision_cfg", "pool_type", "avg", "its vision tower pools its patches .avg. and not the class token"),
        ("vision_cfg", "attentional_pool", True, "its vision tower pools by attention, so patches have no joint embedding"),
        ("vision_cfg", "qk_norm", True, "its vision tower sets qk_norm"),
        ("vision_cfg", "layers", [3, 4, 6, 3], "its vision tower is a ResNet"),
        ("text_cfg", "embed_cls", True, "its text tower ends in a class token"),
        ("text_cfg", "vocab_size", 64000, "its text tower has 64000 tokens, not CLIP's"),
        ("text_cfg", "proj_bias", True, "its text tower sets proj_bias"),
    ],
)
def test_a_setting_that_changes_what_a_tower_computes_is_named(tower, setting, value, reason):
    check(PLAIN, "here")
    with pytest.raises(ConfigError, match=f"^here: only CLIPs with a ViT .*: {reason}$"):
        check(PLAIN | {tower: PLAIN[tower] | {setting: value}}, "here")


@pytest.mark.parametrize("changes", [{"timm_pool": "avg"}, {"timm_proj": "linear"}])
def test_a_tower_of_timm_needs_a_class_token_and_its_own_projection(changes):
    architecture = named("EVA02-B-16")
    with pytest.raises(
        ConfigError, match="timm's eva02_base_patch16_clip_224, which must have timm_pool token and timm_proj null"
    ):
        check(architecture | {"vision_cfg": architecture["vision_cfg"] | changes}, "here")


def test_another_patch_or_no_architecture_at_all_is_refused():
    with pytest.raises(ConfigError, match="here: patch 32 is not supported; use a ViT with patch 14 or 16"):
        check(named("ViT-B-32"), "here")
    with pytest.raises(ConfigError, match="here: not an architecture of open_clip"):
        check({"vision_cfg": {"color": "red"}, "text_cfg": {}}, "here")
    with pytest.raises(ConfigError, match="here: not an architecture of open_clip"):
        check({"embed_dim": 8}, "here")


def test_a_name_and_its_sibling_of_the_other_activation():
    assert sibling("ViT-B-16", True) == "ViT-B-16-quickgelu" and sibling("ViT-B-16-quickgelu", False) == "ViT-B-16"
    assert sibling("ViT-S-16", True) is None
