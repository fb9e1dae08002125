"""The released code's numbers, step by step, and the comparison itself, on a set of other sizes."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from weakclip import fidelity as command
from weakclip.config import BoundaryConfig
from weakclip.data.photometric import IMAGENET
from weakclip.evaluation import fidelity
from weakclip.models import released
from weakclip.models.losses import boundary_loss, boundary_target, crf_images, seeding_loss
from weakclip.models.weakclip import WeakCLIP
from weakclip.recipe import load

# ------------------------------------------------------------------------------------------------------ the released code


@pytest.fixture(scope="module", params=["golden_part", "golden"])
def rows(request) -> dict[str, fidelity.Row]:
    """The comparison with the part of the numbers that every clone has, and with all of them where they are."""
    return {row.name: row for row in fidelity.compare(request.getfixturevalue(request.param))}


@pytest.fixture
def whole(request) -> bool:
    return request.node.callspec.params["rows"] == "golden"


def test_every_number_of_the_released_code_is_ours_within_its_limit(rows, whole):
    assert [row for row in rows.values() if not row.passed] == []
    assert len(rows) == (153 if whole else 76)


@pytest.mark.parametrize(
    "pattern, in_part, in_all, value, measure",
    [
        (".head_logits", 1, 2, 1e-4, "max"),
        (".seg_logits", 1, 1, 1e-4, "max"),
        (".score_map", 2, 4, 1e-4, "max"),
        (".loss_", 4, 8, 1e-5, "relative"),
        (".crf_target", 1, 2, 1e-3, "max"),
        ("grads.", 24, 48, 1e-4, "L2"),
        ("grad_norms.", 1, 2, 1e-4, "relative"),
        ("slide.logits", 0, 1, 1e-4, "max"),
        ("slide.flip_avg_prob", 0, 1, 1e-4, "max"),
        ("aug.prob", 1, 1, 1e-4, "max"),
        ("densecrf.", 7, 9, 0.0, "max"),
        ("tokens.", 2, 2, 0.0, "max"),
        (".crf_image", 1, 2, 0.0, "max"),
    ],
)
def test_the_limits_are_no_wider_than_promised(rows, whole, pattern, in_part, in_all, value, measure):
    found = [row for name, row in rows.items() if pattern in name]
    assert len(found) == (in_all if whole else in_part) and all(row.limit == (value, measure) for row in found)


def test_the_part_is_small(golden_part):
    assert sum(file.stat().st_size for file in golden_part.iterdir() if file.is_file()) <= 1_000_000


# -------------------------------------------------------------------------------------------------------- other sizes

NAMES = ["background", "cat", "traffic light"]
OVERRIDES = [
    "clip={name_tokens: 6, taps: [0, 2, 2, 3]}", "prompts.length=3", "matching={width: 24, heads: 3, layers: 2, dropout: 0}",
    "decoder={fpn_channels: 20, head_channels: 12, dropout: 0}", "loss={weights: {auxiliary: 0.3}, tau: 0.1}",
]  # fmt: skip
SIZES = {
    "class_names": NAMES, "name_tokens": 6, "text_context_length": 9, "tau": 0.1, "aux_weight": 0.3, "vis_heads": 4,
    "text_heads": 2, "dec_width": 24, "dec_heads": 3, "dec_layers": 2, "fpn_channels": 20, "head_channels": 12,
    "out_indices": [0, 2, 2, 3], "input_resolution": 64, "crop": [80, 80], "stride": [48, 48], "ms_ratios": [0.5, 1.5],
    "train_variants": {"train_odd": ["sq", [15, 21]]},
}  # fmt: skip


@pytest.fixture(scope="module")
def other(tiny_recipe, tmp_path_factory) -> Path:
    """A directory in the released code's format, of other sizes, three classes and an odd loss grid. A plain model filled it."""
    folder = tmp_path_factory.mktemp("golden")
    torch.manual_seed(2)
    model = WeakCLIP(load(tiny_recipe, OVERRIDES), NAMES)
    state = released.to_released(released.of_model(model))
    embedding = state.pop("text_encoder.token_embedding.weight")
    ids = model.names_KL.unique()
    state |= {"SPARSE.text_encoder.token_embedding.row_ids": ids, "SPARSE.text_encoder.token_embedding.rows": embedding[ids]}
    inputs = {
        "texts": model.names_KL,
        **{f"{name}.img_uint8": torch.randint(256, (2, *size, 3), dtype=torch.uint8) for name, size in
           {"sq": (80, 80), "rect": (48, 96)}.items()},
        "aug.img_uint8": torch.randint(256, (1, 60, 50, 3), dtype=torch.uint8),
        "slide.img": torch.randn(1, 3, 90, 130),
    }  # fmt: skip
    for name in ("sq", "rect"):
        inputs[f"{name}.img"] = IMAGENET.apply(inputs[f"{name}.img_uint8"].permute(0, 3, 1, 2).float())
        inputs[f"{name}.gt"] = torch.randint(3, (2, 1, *inputs[f"{name}.img"].shape[2:]), dtype=torch.uint8)
    outputs, grads, norms = numbers(model, inputs)
    parts = {"state": state, "inputs": inputs, "outputs": outputs, "grads": grads}
    for part, tensors in parts.items():
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / f"{part}.safetensors")
    info = {"flip_avg_prob_subsample": 3, "train": {"train_odd": {"grad_l2_all": norms}}}
    (folder / "config.json").write_text(json.dumps({"config": SIZES, "info": info}))
    return folder


def numbers(model: WeakCLIP, inputs: dict[str, torch.Tensor]) -> tuple[dict, dict, dict]:
    """Some outputs, gradients and their norms, by plain calls."""
    outputs = {}
    with torch.no_grad():
        for name in ("sq", "rect"):
            output = model.eval()(inputs[f"{name}.img"])
            outputs |= {f"eval_{name}.head_logits": output.logits_BKhw, f"eval_{name}.score_map": output.scores_BKhw}
    trained = copy.deepcopy(model).train()
    images, seeds = inputs["sq.img"], inputs["sq.gt"][:, 0].long()
    output = trained(images)
    logits = F.interpolate(output.logits_BKhw, size=(15, 21), mode="bilinear", align_corners=True)
    probs = logits.softmax(1) + 1e-7
    probs = probs / probs.sum(1, keepdim=True)
    small = F.interpolate(seeds[:, None].float(), size=(15, 21))[:, 0].long()
    target = boundary_target(probs.detach(), crf_images(images, (15, 21), IMAGENET, truncate=True), "lattice")
    named = F.interpolate(output.scores_BKhw / 0.1, size=(80, 80), mode="bilinear", align_corners=False)
    losses = {
        "decode.loss_seeding": seeding_loss(probs, small, balance=True),
        "decode.loss_boundary": boundary_loss(probs, target, BoundaryConfig().ratio_clamp),
        "aux_identity.loss_ce": 0.3 * F.cross_entropy(named, seeds),
    }
    losses["loss_total"] = sum(losses.values())
    losses["loss_total"].backward()
    outputs |= {f"train_odd.{name}": loss[None] for name, loss in losses.items()}
    grads = {released.released_name(name): p.grad for name, p in trained.named_parameters() if p.grad is not None}
    grads["contexts"] = grads["contexts"][None]
    return (
        outputs,
        {f"train_odd.{name}": gradient for name, gradient in grads.items()},
        {name: gradient.norm().item() for name, gradient in grads.items()} | {"context_decoder.decoder.0.norm1.weight": None},
    )


def test_a_set_of_other_sizes_is_compared_unchanged(other, capsys):
    command.main([str(other)])
    out = capsys.readouterr().out
    assert "train_odd.decode.loss_seeding" in out and "grads.train_odd.contexts" in out and "FAILED" not in out
    assert out.splitlines()[-1].startswith("all ") and out.splitlines()[-1].endswith(" within their limits")


def changed(other: Path, folder: Path, part: str, **tensors: torch.Tensor) -> Path:
    shutil.copytree(other, folder)
    save_file(load_file(folder / f"{part}.safetensors") | tensors, folder / f"{part}.safetensors")
    return folder


def test_a_difference_is_found_named_and_an_error(other, tmp_path, capsys):
    logits = load_file(other / "outputs.safetensors")["eval_sq.head_logits"]
    logits[0, 1, 2, 3] += 2e-4
    folder = changed(other, tmp_path / "off", "outputs", **{"eval_sq.head_logits": logits})
    with pytest.raises(ValueError, match=r"^1 of \d+ numbers differ from the released code's: eval_sq.head_logits$"):
        command.main([str(folder)])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("eval_sq.head_logits"))
    assert "2.0e-04" in line and line.endswith("FAILED")


def test_what_we_compute_no_counterpart_of_or_of_another_shape_is_no_success(other, tmp_path, capsys):
    folder = changed(
        other, tmp_path / "odd", "outputs", **{"eval_sq.new": torch.zeros(1), "eval_sq.score_map": torch.zeros(2, 3, 4, 4)}
    )
    with pytest.raises(ValueError, match=r"^2 of \d+ numbers differ from the released code's: eval_sq.score_map, eval_sq.new$"):
        command.main([str(folder)])
    assert "not computed" in capsys.readouterr().out


def test_every_nth_element_is_enough_and_steps_without_inputs_are_left_out(other, tmp_path, capsys):
    folder = shutil.copytree(other, tmp_path / "part")
    inputs, outputs = (load_file(folder / f"{part}.safetensors") for part in ("inputs", "outputs"))
    for name in ("sq.img", "rect.img", "rect.img_uint8", "slide.img"):
        del inputs[name]
    outputs = {name: tensor for name, tensor in outputs.items() if not name.startswith("eval_rect.")}
    logits = outputs.pop("eval_sq.head_logits").flatten()[::7].contiguous()
    save_file(inputs, folder / "inputs.safetensors")
    save_file(outputs | {"eval_sq.head_logits[::7]": logits}, folder / "outputs.safetensors")
    command.main([str(folder)])
    assert "eval_sq.head_logits[::7]" in capsys.readouterr().out
    logits[5] += 2e-4
    save_file(outputs | {"eval_sq.head_logits[::7]": logits}, folder / "outputs.safetensors")
    with pytest.raises(ValueError, match=r"^1 of \d+ numbers differ from the released code's: eval_sq.head_logits\[::7\]$"):
        command.main([str(folder)])


def test_not_a_number_is_a_difference():
    nan = torch.tensor([1.0, float("nan")])
    for measure in ("max", "relative", "L2"):
        gap = fidelity.difference(nan, torch.ones(2), measure)
        assert not fidelity.Row("x", gap, fidelity.Limit(1.0, measure)).passed


@pytest.mark.parametrize("missing", ["config.json", "state.safetensors", "outputs.safetensors", "grads.safetensors"])
def test_an_incomplete_directory_names_the_file(other, tmp_path, missing):
    shutil.copytree(other, tmp_path / "less")
    (tmp_path / "less" / missing).unlink()
    with pytest.raises(ValueError, match=f"less/{missing}"):
        command.main([str(tmp_path / "less")])
