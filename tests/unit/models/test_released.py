"""Conversion between released checkpoints and ours: names, values, the 91-way head, and refused files."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from weakclip import convert, labels
from weakclip.checkpoints import weights
from weakclip.checkpoints.weight_files import ArchiveError
from weakclip.config import Config, ConfigError, MatchingConfig
from weakclip.evaluation.fidelity import Golden
from weakclip.models import released
from weakclip.models.clip import FrozenClip, open_clip
from weakclip.models.load import CLASSES, load_weakclip
from weakclip.models.weakclip import WeakCLIP
from weakclip.recipe import load, save


@pytest.fixture(scope="module")
def names_file(tiny_recipe) -> Path:
    return tiny_recipe.parent / "names.txt"


@pytest.fixture
def released_file(tiny_model, tmp_path) -> Path:
    """A checkpoint as mmsegmentation saves it, of a tiny model."""
    state = released.to_released(released.of_model(tiny_model()))
    meta = {
        "CLASSES": ("background", "cat", "dog", "cow"),
        "PALETTE": [[0, 0, 0]] * 4,
        "config": "model = dict()",
        "hook_msgs": {},
    }
    torch.save({"meta": meta, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "released.pth")
    return tmp_path / "released.pth"


def run(*arguments: object) -> None:
    convert.main([str(argument) for argument in arguments])


def images(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(5))


# --------------------------------------------------------------------------------------------------------------- names


def full_size(classes: str, repo: Path) -> dict[str, tuple[int, ...]]:
    """Released names and shapes of a full-size model of ours."""
    config = load(repo / "configs/voc.yaml", ["clip.pretrained=none", f"classes={classes}"])
    with torch.device("meta"):
        model = WeakCLIP(config, labels.class_names(classes))
    return {name: tuple(tensor.shape) for name, tensor in released.to_released(released.of_model(model)).items()}


@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_the_names_and_shapes_are_those_of_the_released_checkpoints_with_nothing_left_over(golden, repo, tmp_path, kind):
    lines = (golden / f"keys_{kind}.txt").read_text().splitlines()
    want = {name: ast.literal_eval(shape) for name, shape, *_ in (line.split("\t") for line in lines)}
    raw = tmp_path / "raw.txt"
    raw.write_text("\n".join(released.raw_coco_names()))
    assert full_size("voc" if kind == "voc" else str(raw), repo) == want


def test_every_name_of_a_model_goes_to_the_released_layout_and_back(tiny_model):
    for name in released.of_model(tiny_model()):
        assert released.our_name(released.released_name(name)) == name


# ---------------------------------------------------------------------------------------------------------- round trips


def test_ours_to_released_to_ours_is_the_identity(tiny_model, tmp_path, names_file):
    ours = released.of_model(tiny_model())
    metadata = released.metadata({}, True, ("background", "cat", "dog", "cow"), ())
    released.write(released.Checkpoint(ours, metadata), tmp_path / "out.pth")
    back = released.read(tmp_path / "out.pth", str(names_file)).ours
    assert back.keys() == ours.keys() and all(back[name].equal(ours[name]) for name in ours)


def test_released_to_ours_to_released_is_the_identity(released_file, tmp_path, names_file):
    run(released_file, tmp_path / "ours.safetensors", "--classes", names_file)
    run(tmp_path / "ours.safetensors", tmp_path / "again.pth")
    before, after = (torch.load(path, weights_only=True) for path in (released_file, tmp_path / "again.pth"))
    assert list(before["state_dict"]) != [] and before["state_dict"].keys() == after["state_dict"].keys()
    assert all(after["state_dict"][name].equal(tensor) for name, tensor in before["state_dict"].items())
    assert after["meta"]["CLASSES"] == list(before["meta"]["CLASSES"])


def test_a_run_goes_to_the_released_layout_and_comes_back_as_the_same_model(
    tiny_config, tiny_model, tmp_path, names_file, caplog
):
    config = tiny_config()
    weights.save(tiny_model(), Path(config.run) / "weights/best.safetensors", step=7)
    save(config, Path(config.run) / "config.yaml")
    run(config.run, tmp_path / "run.pth")
    # The tiny CLIP's heads are 16 wide, which no shape shows; the converter assumes 64, as in OpenAI's models.
    ours = released.read(tmp_path / "run.pth", str(names_file)).ours
    run(config.run, tmp_path / "whole.safetensors")
    caplog.clear()
    again = load_weakclip(replace(config, run="elsewhere"), tmp_path / "whole.safetensors").cpu()
    assert "contains its own CLIP; clip.pretrained" in caplog.text
    want = released.of_model(tiny_model())
    for state in (ours, released.of_model(again)):
        assert state.keys() == want.keys() and all(state[name].equal(want[name]) for name in want)
    x_B3HW = images(2, 3, 64, 96)
    assert again(x_B3HW).logits_BKhw.equal(tiny_model()(x_B3HW).logits_BKhw)


def test_a_converted_file_is_a_clip_for_training_too(tiny_config, tiny_model, released_file, tmp_path, names_file):
    run(released_file, tmp_path / "ours.safetensors", "--classes", names_file)
    clip = replace(tiny_config().clip, model=None, pretrained=str(tmp_path / "ours.safetensors"))
    got, want = FrozenClip(clip, 8).vision, tiny_model().clip.vision
    assert got.class_embedding.equal(want.class_embedding) and got.positional_embedding.equal(want.positional_embedding)
    single = FrozenClip(replace(clip, double_class_embedding=False), 8).vision
    assert (2 * single.class_embedding).equal(want.class_embedding)


def test_open_clip_itself_gives_the_released_features_of_a_converted_clip(golden):
    """The doubled class embedding is in the weights: a plain ViT computes what the released code computes."""
    found = Golden(golden)
    cfg = released.architecture(found.ours, found.sizes["vis_heads"], found.sizes["text_heads"])
    clip = open_clip.CLIP(**cfg).eval()
    state = {name.removeprefix("clip."): tensor for name, tensor in found.ours.items() if name.startswith("clip.")}
    clip.load_state_dict({"logit_scale": clip.logit_scale, **state})
    with torch.no_grad():
        features_BE = clip.encode_image(found.inputs["sq.img"])
    torch.testing.assert_close(features_BE, found.stored()["eval_sq.global_embedding"], rtol=0, atol=1e-4)


def test_a_run_in_one_file_keeps_the_normalisation_of_its_clip(tiny_config, save_tiny_clip, tmp_path):
    settings = save_tiny_clip(tmp_path / "clip") / "open_clip_config.json"
    half = {"preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | half))
    config = tiny_config(f"clip.pretrained={settings.parent}", "clip.normalisation=source")
    weights.save(WeakCLIP(config, labels.class_names(config.classes)), Path(config.run) / "weights/best.safetensors", step=7)
    save(config, Path(config.run) / "config.yaml")
    run(config.run, tmp_path / "whole.safetensors")
    assert load_weakclip(config, tmp_path / "whole.safetensors").normalisation.mean == (127.5,) * 3


def test_openais_archive_becomes_safetensors_with_the_same_features(make_tiny_clip, openai_archive, tiny_clip, tmp_path, capsys):
    openai_archive(make_tiny_clip(), tmp_path / "openai.pt")
    run(tmp_path / "openai.pt", tmp_path / "clip.safetensors")
    assert "not used: input_resolution, context_length, vocab_size" in capsys.readouterr().out
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    towers = []
    for folder, file in (("a", "openai.pt"), ("b", "clip.safetensors")):
        (tmp_path / folder / "open_clip_config.json").write_bytes((tiny_clip / "open_clip_config.json").read_bytes())
        (tmp_path / file).rename(tmp_path / folder / file)
        towers.append(FrozenClip(replace(Config().clip, model=None, pretrained=str(tmp_path / folder), image_size=64), 8).vision)
    x_B3HW = images(1, 3, 64, 64)
    assert towers[0](x_B3HW).global_BE.equal(towers[1](x_B3HW).global_BE)


# ------------------------------------------------------------------------------------------------------- COCO's 91 ids


@pytest.fixture(scope="module")
def raw_model(tiny_recipe, tmp_path_factory) -> WeakCLIP:
    """A tiny model over COCO's 91 raw ids."""
    names = tmp_path_factory.mktemp("raw") / "raw.txt"
    names.write_text("\n".join(released.raw_coco_names()))
    torch.manual_seed(1)
    return WeakCLIP(load(tiny_recipe, [f"classes={names}"]), released.raw_coco_names()).eval()


def test_the_raw_ids_are_cocos(golden):
    assert released.raw_coco_names()[0] == "background" and released.raw_coco_names()[12] == "street sign"
    for raw, index in labels.COCO_ID_TO_CLASS.items():
        assert released.raw_coco_names()[raw] == labels.COCO[index] and labels.COCO_RAW_IDS[index] == raw
    assert sorted(labels.COCO_RAW_IDS) == list(range(91))


def test_a_91_way_head_is_cut_to_81_ways_exactly(raw_model, tiny_recipe, tmp_path):
    torch.save({"state_dict": released.to_released(released.of_model(raw_model))}, tmp_path / "coco.pth")
    checkpoint = released.read(tmp_path / "coco.pth")
    assert json.loads(checkpoint.meta[CLASSES]) == list(labels.COCO)
    config = load(tiny_recipe, ["classes=coco"])
    config = replace(config, matching=replace(config.matching, extra_names=list(labels.COCO_GAP_NAMES)))
    model = WeakCLIP(config, labels.COCO).eval()
    model.load_state_dict({name: tensor for name, tensor in checkpoint.ours.items() if not name.startswith("clip.")})
    x_B3HW = images(2, 3, 64, 96)
    with torch.no_grad():
        raw, cut = raw_model(x_B3HW), model(x_B3HW)
    classes = list(labels.COCO_RAW_IDS[:81])
    assert cut.logits_BKhw.shape[1] == cut.scores_BKhw.shape[1] == 81
    # The same numbers, summed in another order.
    torch.testing.assert_close(cut.logits_BKhw, raw.logits_BKhw[:, classes], rtol=0, atol=1e-5)
    torch.testing.assert_close(cut.scores_BKhw, raw.scores_BKhw[:, classes], rtol=0, atol=1e-6)


def test_a_cut_head_goes_back_to_91_ways_and_never_predicts_a_gap(raw_model, tmp_path, capsys):
    torch.save({"state_dict": released.to_released(released.of_model(raw_model))}, tmp_path / "coco.pth")
    run(tmp_path / "coco.pth", tmp_path / "ours.safetensors")
    assert "cut from 91 raw ids to 81 classes; still matched, never predicted: street sign, hat" in capsys.readouterr().out
    run(tmp_path / "ours.safetensors", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back["meta"]["CLASSES"] == released.raw_coco_names() and len(back["meta"]["PALETTE"]) == 91
    want = released.of_model(raw_model)
    ours = released.from_released(back["state_dict"])
    classes, gaps = list(labels.COCO_RAW_IDS[:81]), list(labels.COCO_RAW_IDS[81:])
    head = {"decoder.head.classify.weight": 0, "decoder.head.classify.bias": -1e4}
    assert all(ours[name].equal(want[name]) for name in want.keys() - head.keys())
    for name, value in head.items():
        assert ours[name][classes].equal(want[name][classes]) and ours[name][gaps].eq(value).all()


# ------------------------------------------------------------------------------------------------------------- refusals


def save_changed(released_file: Path, path: Path, drop: str = "", **changes: torch.Tensor) -> Path:
    state = torch.load(released_file, weights_only=True)["state_dict"]
    torch.save({"state_dict": {name: t for name, t in state.items() if not drop or drop not in name} | changes}, path)
    return path


@pytest.mark.parametrize(
    "drop, changes, message",
    [
        ("neck.fpn_convs.2", {}, "missing keys .2.: neck.fpn_convs.2.conv.weight, neck.fpn_convs.2.conv.bias; use a check"),
        ("resblocks.1.", {}, "missing keys .12.: backbone.transformer.resblocks.1.*, .* and 2 more; use"),
        ("", {"neck.more": torch.zeros(1), "own.thing": torch.zeros(1)}, "unexpected keys .2.: neck.more, own.thing; use"),
        ("", {"gamma": torch.zeros(7)}, r"shape mismatch .1.: gamma is \[7\], not \[32\]; use"),
        ("backbone.class_embedding", {}, "not a released WeakCLIP on a ViT; missing keys: backbone.class_embedding"),
        ("", {"backbone.conv1.weight": torch.zeros(3)}, "not a released WeakCLIP on a ViT; missing keys: backbone.conv1.weight"),
    ],
)
def test_missing_unknown_and_reshaped_tensors_are_listed(released_file, tmp_path, names_file, drop, changes, message):
    path = save_changed(released_file, tmp_path / "changed.pth", drop, **changes)
    with pytest.raises(ConfigError, match=f"changed.pth: .*{message}") as caught:
        run(path, tmp_path / "out.safetensors", "--classes", names_file)
    assert "\n" not in str(caught.value) and not (tmp_path / "out.safetensors").exists()


def test_a_clip_that_lost_its_last_block_is_refused(repo):
    config = load(repo / "configs/voc.yaml", ["clip.pretrained=none"])
    with torch.device("meta"):
        state = released.to_released(released.of_model(WeakCLIP(config, labels.VOC)))
    assert len(released.read_released(state, "whole.pth")) == 521
    for tower, kind in (("backbone", "vision"), ("text_encoder", "text")):
        less = {name: tensor for name, tensor in state.items() if not name.startswith(f"{tower}.transformer.resblocks.11.")}
        with pytest.raises(ConfigError, match=f"less.pth: 11 {kind} blocks, but ViT-B-16-quickgelu has 12; it is incomplete"):
            released.read_released(less, "less.pth")


def test_a_resnets_checkpoint_is_refused_as_one(tmp_path):
    torch.save({"state_dict": {"backbone.layer1.0.conv1.weight": torch.zeros(1), "gamma": torch.zeros(1)}}, tmp_path / "rn.pth")
    with pytest.raises(ConfigError, match="rn.pth: not a released WeakCLIP on a ViT; missing keys: contexts, backbone"):
        run(tmp_path / "rn.pth", tmp_path / "out.safetensors")


def test_classes_must_be_known_and_as_many_as_the_head_has(released_file, tmp_path):
    with pytest.raises(ConfigError, match="released.pth: 4 classes are neither VOC's 21 nor COCO's 91; name them with --classes"):
        run(released_file, tmp_path / "out.safetensors")
    with pytest.raises(ConfigError, match="released.pth: made for 4 classes, but --classes names 21"):
        run(released_file, tmp_path / "out.safetensors", "--classes", "voc")


def test_a_converted_file_is_not_loaded_for_other_classes(released_file, tiny_config, tmp_path, names_file):
    run(released_file, tmp_path / "ours.safetensors", "--classes", names_file)
    with pytest.raises(ValueError, match="ours.safetensors: its classes are 4 .background, cat, dog, cow"):
        load_weakclip(tiny_config("classes=voc"), tmp_path / "ours.safetensors")


def test_the_trainable_part_alone_and_the_released_layout_say_what_to_do(tiny_model, released_file, tiny_config, tmp_path):
    weights.save(tiny_model(), tmp_path / "last.safetensors", step=1)
    with pytest.raises(ConfigError, match="last.safetensors: a run's trainable part without its CLIP; give the run directory"):
        run(tmp_path / "last.safetensors", tmp_path / "out.pth")
    for wrong in (
        lambda: load_weakclip(tiny_config(), released_file),
        lambda: FrozenClip(replace(tiny_config().clip, pretrained=str(released_file)), 8),
    ):
        with pytest.raises(ConfigError, match="released.pth.* weakclip.convert .*released.pth OUT.safetensors"):
            wrong()
    with pytest.raises(ConfigError, match="out.ckpt: must end in .safetensors .our format. or .pth"):
        run(released_file, tmp_path / "out.ckpt")


def test_a_clip_has_no_place_in_the_released_layout(make_tiny_clip, openai_archive, tmp_path):
    openai_archive(make_tiny_clip(), tmp_path / "openai.pt")
    with pytest.raises(ConfigError, match="out.pth: the released layout cannot hold a CLIP alone"):
        run(tmp_path / "openai.pt", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_that_would_run_code_is_refused_and_nothing_runs(released_file, tmp_path, names_file):
    content = torch.load(released_file, weights_only=True)
    for place in ("meta", "optimizer", "state_dict"):
        torch.save(content | {place: {"x": Payload(tmp_path / "ran")}}, tmp_path / "bad.pth")
        with pytest.raises(ArchiveError, match="bad.pth: asks for .*open.* nothing in it was executed"):
            run(tmp_path / "bad.pth", tmp_path / "out.safetensors", "--classes", names_file)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out.safetensors").exists()
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert (tmp_path / "ran").exists()  # the payload works where pickles may run code


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_one_clear_error(released_file, tmp_path, names_file, part):
    data = released_file.read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: int(part * len(data))])
    with pytest.raises(ArchiveError, match="cut.pth: ") as caught:
        run(tmp_path / "cut.pth", tmp_path / "out.safetensors", "--classes", names_file)
    assert "\n" not in str(caught.value) and not (tmp_path / "out.safetensors").exists()


def test_heads_that_were_never_in_a_released_model_are_left_out_and_named(released_file, tmp_path, names_file, capsys):
    path = save_changed(released_file, tmp_path / "more.pth", **{"auxiliary_head.conv_seg.bias": torch.zeros(4)})
    run(path, tmp_path / "out.safetensors", "--classes", names_file)
    assert "not used: auxiliary_head.conv_seg.bias: not part of the published recipe" in capsys.readouterr().out
    assert not any("auxiliary_head" in name for name in load_file(tmp_path / "out.safetensors"))


def test_the_summary_counts_what_has_no_effect(released_file, tmp_path, names_file, capsys):
    run(released_file, tmp_path / "out.safetensors", "--classes", names_file)
    out = capsys.readouterr().out
    assert "without effect: 80 of these" in out and "class embedding: doubled" in out and out.startswith("used: ")
    assert MatchingConfig().layers == 3
