"""Comparison with the published implementation: every step beside what the released code computed.

A golden directory holds the output of one run of the released code: config.json (sizes, class names, gradient norms), and as
safetensors files state (weights under their released names), inputs, outputs, grads and optionally tokens and densecrf.

It may be incomplete: steps without an input are left out, NAME.img is computed where only NAME.img_uint8 exists, and a tensor
stored as "NAME[::7]" is every 7th element of NAME, flattened.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from weakclip.checkpoints import state_dict, weight_files
from weakclip.config import (
    ClipConfig,
    Config,
    ConfigError,
    CrfConfig,
    DecoderConfig,
    InferenceConfig,
    LossConfig,
    MatchingConfig,
    PromptConfig,
)
from weakclip.data.photometric import IMAGENET
from weakclip.data.transforms import resize_image
from weakclip.labels import VOC
from weakclip.masks import sliding_window
from weakclip.masks.crf import BOUNDARY, dense_crf
from weakclip.models import released
from weakclip.models.clip import tokenize
from weakclip.models.losses import LossInputs, boundary_target, crf_images, on_grid, weighted_losses
from weakclip.models.pretrained import unpack_tokens
from weakclip.models.resize import resize
from weakclip.models.weakclip import WeakCLIP
from weakclip.runtime.tables import Table

# The published dense CRFs at full resolution, and the one of the boundary loss, by the names of their outputs.
CRFS = {
    "voc": CrfConfig(),
    "coco": CrfConfig(gaussian_sxy=1, bilateral_sxy=67, bilateral_srgb=3, bilateral_compat=4),
    "train": BOUNDARY,
}


class Limit(NamedTuple):
    value: float
    measure: str
    """max: largest absolute difference; relative: largest difference relative to the stored value; L2: norm of the difference
    over the norm of the stored tensor; share: fraction of the elements that differ."""


# By a tensor's name; the first pattern that matches applies. pydensecrf's own float noise on the CRF target is 1e-4.
LIMITS = (
    (r"^grad_norms", Limit(1e-4, "relative")),
    (r"^grads\.", Limit(1e-4, "L2")),
    (r"loss\w*$", Limit(1e-5, "relative")),
    (r"crf_\w*target", Limit(1e-3, "max")),
    (r"argmax|aug\.pred", Limit(1e-3, "share")),
    (r"acc_seg", Limit(0.1, "max")),  # percent: a near tie may be decided the other way
    (r"^(tokens|densecrf)\.|texts|keys|uint8|count", Limit(0.0, "max")),
    (r"", Limit(1e-4, "max")),
)


class Row(NamedTuple):
    name: str
    difference: float
    """NaN where we compute no such tensor, infinite on a shape mismatch."""
    limit: Limit

    @property
    def passed(self) -> bool:
        return self.difference <= self.limit.value


class Golden:
    """A golden directory, and our model with its weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            about = json.loads((folder / "config.json").read_text())
            self.sizes, self.info = about["config"], about["info"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{folder}/config.json: not the config of a golden directory ({error!r})") from error
        given = self.read("inputs")
        self.inputs = dict(network_inputs(given)) | given
        self.ours = released.read_released(self._released(), str(folder / "state.safetensors"))
        self.model = self._build()

    def read(self, part: str) -> dict[str, Tensor]:
        return weight_files.read(self.folder / f"{part}.safetensors").tensors

    def _released(self) -> dict[str, Tensor]:
        """Return the state dict in float32, with the full token embedding (the file holds only the rows that occur)."""
        released = {name: t.float() if t.is_floating_point() else t for name, t in self.read("state").items()}
        prefix = "SPARSE.text_encoder."
        rows = {name.removeprefix(prefix): released.pop(name) for name in list(released) if name.startswith(prefix)}
        return released | {f"text_encoder.{name}": tensor for name, tensor in unpack_tokens(rows, vocabulary=49408).items()}

    def _build(self) -> WeakCLIP:
        sizes = self.sizes
        architecture = released.architecture(self.ours, sizes["vis_heads"], sizes["text_heads"])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "converted.safetensors"
            released.write(released.Checkpoint(self.ours, released.metadata(architecture, True, sizes["class_names"], ())), path)
            clip = ClipConfig(None, str(path), sizes["input_resolution"], sizes["name_tokens"], 0.0, taps=sizes["out_indices"])
            config = Config(
                precision="fp32",
                clip=clip,
                prompts=PromptConfig(sizes["text_context_length"] - sizes["name_tokens"]),
                matching=MatchingConfig(sizes["dec_width"], sizes["dec_layers"], sizes["dec_heads"], dropout=0),
                decoder=DecoderConfig(sizes["fpn_channels"], sizes["head_channels"], dropout=0),
            )
            model = WeakCLIP(config, sizes["class_names"])
        model.clip.requires_grad_(True)  # the released code computes gradients of its frozen towers
        return model

    def reset(self) -> WeakCLIP:
        """Return the model with the stored weights and statistics and no gradients."""
        trainable = {name: tensor for name, tensor in self.ours.items() if not name.startswith("clip.")}
        state_dict.load_into(self.model, trainable, str(self.folder), "use matching sizes in config.json")
        for parameter in released.parameters(self.model).values():
            parameter.grad = None
        return self.model

    def stored(self) -> dict[str, Tensor]:
        """Return what the released code computed, by name. Targets stored as logarithms become probabilities."""
        found = {name: t.exp() if "crf_log_target" in name else t for name, t in self.read("outputs").items()}
        found |= {f"grads.{name}": tensor for name, tensor in self.read("grads").items()}
        for variant, numbers in self.info["train"].items():
            norms = numbers["grad_l2_all"].values()
            found[f"grad_norms.{variant}"] = torch.tensor([norm or 0.0 for norm in norms], dtype=torch.float64)
        for part in ("tokens", "densecrf"):
            if (self.folder / f"{part}.safetensors").exists():
                found |= {f"{part}.{name}": tensor for name, tensor in self.read(part).items()}
        found |= {f"inputs.{name}": tensor for name, tensor in self.read("inputs").items()}
        return {name: tensor for name, tensor in found.items() if not re.search(GIVEN, name)}


# Random inputs, which are not computed.
GIVEN = r"^inputs\..*(uint8|gt|image_labels|slide\.img)$|^densecrf\.(probs|image)"

Computed = Iterator[tuple[str, Tensor]]


def preprocessing(golden: Golden) -> Computed:
    """Compute token ids from class names, and the network's input from images."""
    yield "inputs.texts", golden.model.names_KL
    yield "tokens.voc", tokenize(VOC, golden.sizes["name_tokens"])
    yield "tokens.coco", tokenize(released.raw_coco_names(), golden.sizes["name_tokens"])
    for name, images_B3HW in network_inputs(golden.inputs):
        yield f"inputs.{name}", images_B3HW
    for i, size in enumerate(scaled_sizes(golden)):
        scaled_HW3 = torch.from_numpy(resize_image(golden.inputs["aug.img_uint8"][0].numpy(), size))
        yield f"inputs.aug.img_s{i}", IMAGENET.apply(scaled_HW3.permute(2, 0, 1).float())[None]


def network_inputs(inputs: dict[str, Tensor]) -> Computed:
    """Return the normalised network inputs of all 8-bit images, by name."""
    for name, images_BHW3 in inputs.items():
        if name.endswith(".img_uint8"):
            yield name.removesuffix("_uint8"), IMAGENET.apply(images_BHW3.permute(0, 3, 1, 2).float())


def scaled_sizes(golden: Golden) -> list[tuple[int, int]]:
    """Return (H, W) of the multi-scale test's image at each ratio (mmcv.imrescale)."""
    _, H, W, _ = golden.inputs["aug.img_uint8"].shape
    return [(int(H * ratio + 0.5), int(W * ratio + 0.5)) for ratio in golden.sizes["ms_ratios"]]


@torch.no_grad()
def evaluation(golden: Golden) -> Computed:
    """Compute the model's intermediate results and outputs in evaluation mode."""
    model = golden.reset().eval()
    text_KE = model.encode_names()
    yield "text_features_no_context_decoder", text_KE[None]
    for name in ("sq", "rect"):
        if f"{name}.img" not in golden.inputs:
            continue
        images_B3HW = golden.inputs[f"{name}.img"]
        features = model.clip.vision(images_B3HW)
        pyramid = model.adapter(features.taps)
        output = model(images_B3HW)
        parts = {
            "global_embedding": features.global_BE,
            "visual_embedding": features.visual_BEhw,
            "text_embeddings": model.matching.attend(text_KE, features.global_BE, features.visual_BEhw)[0],
            "score_map": output.scores_BKhw,
            "head_logits": output.logits_BKhw,
            "seg_logits": resize(output.logits_BKhw, images_B3HW.shape[2:]),
            **{f"backbone_out{number}": level.map_BDHW for number, level in enumerate(pyramid)},
            **{f"neck_out{number}": x for number, x in enumerate(model.decoder.neck(pyramid, output.scores_BKhw))},
        }
        yield from ((f"eval_{name}.{part}", tensor) for part, tensor in parts.items())


def training(golden: Golden) -> Computed:
    """Compute losses, their parts, gradients and BatchNorm's statistics after one forward and backward pass."""
    for variant, (name, grid) in golden.sizes["train_variants"].items():
        weights = LossConfig().weights | {"auxiliary": golden.sizes["aux_weight"]}
        config = LossConfig(grid=list(grid), weights=weights, tau=golden.sizes["tau"])
        images_B3HW, seeds_BHW = golden.inputs[f"{name}.img"], golden.inputs[f"{name}.gt"][:, 0].long()
        model = golden.reset().train()
        output = model(images_B3HW)
        losses = weighted_losses(LossInputs(output.logits_BKhw, output.scores_BKhw, seeds_BHW, images_B3HW, config))
        torch.stack(list(losses.values())).sum().backward()
        parts = {
            "decode.loss_seeding": losses["seeding"],
            "decode.loss_boundary": losses["boundary"],
            "aux_identity.loss_ce": losses["auxiliary"],
            "loss_total": torch.stack(list(losses.values())).sum(),
        }
        parts = {part: loss.detach()[None] for part, loss in parts.items()}
        parts |= loss_parts(output.scores_BKhw.detach(), output.logits_BKhw.detach(), seeds_BHW, images_B3HW, config)
        for own, tensor in model.state_dict().items():
            parts[f"bn_after.{released.released_name(own)}"] = tensor
        yield from ((f"{variant}.{part}", tensor) for part, tensor in parts.items())
        gradients = released_gradients(model)
        yield from ((f"grads.{variant}.{theirs}", gradient) for theirs, gradient in gradients.items())
        names = golden.info["train"][variant]["grad_l2_all"]
        norms = [gradients[theirs].norm().item() if theirs in gradients else 0.0 for theirs in names]
        yield f"grad_norms.{variant}", torch.tensor(norms, dtype=torch.float64)


def loss_parts(
    scores_BKhw: Tensor, logits_BKhw: Tensor, seeds_BHW: Tensor, images_B3HW: Tensor, config: LossConfig
) -> dict[str, Tensor]:
    """Return the parts of the losses under the names of the released code's intermediate results."""
    logits_BKGG, probs_BKGG, seeds_BGG = on_grid(logits_BKhw, seeds_BHW, config)
    images_BGG3 = crf_images(images_B3HW, config.grid, IMAGENET, truncate=True)
    target_BKGG = boundary_target(probs_BKGG, images_BGG3, "lattice")
    named_BHW = resize(scores_BKhw / config.tau, seeds_BHW.shape[1:]).argmax(1)
    return {
        "score_map": scores_BKhw,
        "logits_at_feature_size": logits_BKGG,
        "probs": probs_BKGG,
        "crf_probs_in": probs_BKGG.clamp(min=1e-4),
        "crf_image_uint8": images_BGG3,
        "crf_target_f32": target_BKGG,
        "crf_log_target_f64": target_BKGG,
        "cues_count": torch.stack([(seeds_BGG == k).sum((1, 2)) for k in range(probs_BKGG.shape[1])], dim=1).float(),
        "aux_identity.acc_seg": 100 * (named_BHW == seeds_BHW).float().mean()[None],
    }


def released_gradients(model: WeakCLIP) -> dict[str, Tensor]:
    """Return gradients by released name, of frozen towers too. The class embedding enters twice, so its gradient doubles."""
    found = {name: p.grad for name, p in released.parameters(model).items() if p.grad is not None}
    found["prompts_ND"] = found["prompts_ND"][None]
    found["clip.visual.class_embedding"] = 2 * found["clip.visual.class_embedding"]
    return {str(released.released_name(name)): gradient for name, gradient in found.items()}


@torch.no_grad()
def inference(golden: Golden) -> Computed:
    """Compute sliding-window inference with flips and several scales."""
    model, sizes = golden.reset().eval(), golden.sizes
    if len(set(sizes["crop"])) > 1 or len(set(sizes["stride"])) > 1:
        raise ConfigError(f"{golden.folder}/config.json: crop {sizes['crop']}, stride {sizes['stride']}: must be square")
    config = InferenceConfig(window=sizes["crop"][0], stride=sizes["stride"][0])
    predictor = model.predictor()
    if "slide.img" in golden.inputs:
        x_3HW = golden.inputs["slide.img"][0]
        logits_KHW = sliding_window.slide(predictor, x_3HW, config)
        flipped_KHW = sliding_window.slide(predictor, x_3HW.flip(2), config)
        probs_KHW = (logits_KHW.softmax(0) + flipped_KHW.softmax(0).flip(2)) / 2
        every = golden.info["flip_avg_prob_subsample"]
        yield "slide.logits", logits_KHW[None]
        yield "slide.flip_avg_prob_sub", probs_KHW[None, :, ::every, ::every]
        yield "slide.flip_avg_argmax", probs_KHW.argmax(0)[None]
    probs_KHW = sliding_window.average(predictor, golden.inputs["aug.img_uint8"][0].numpy(), scaled_sizes(golden), config)
    yield "aug.prob_all", probs_KHW[None]
    yield "aug.pred", probs_KHW.argmax(0)
    yield "aug.keys", probs_KHW.argmax(0).unique()


def dense_crfs(golden: Golden) -> Computed:
    """Compute the dense CRFs at full resolution, for all or only the first classes."""
    if not (golden.folder / "densecrf.safetensors").exists():
        return
    crf = golden.read("densecrf")
    for name in crf:
        if match := re.fullmatch(r"(\w+?)_q(_subset)?(?:_t(\d+))?", whole(name)):
            config = replace(CRFS[match[1]], iterations=int(match[3] or 10))
            marginals_KHW = dense_crf(crf[f"probs{match[2] or ''}"].numpy(), crf["image_uint8"].numpy(), config)
            yield f"densecrf.{match[0]}", torch.from_numpy(marginals_KHW)


def compare(folder: Path) -> Iterator[Row]:
    """Compare every stored tensor with ours. Raises ConfigError or ArchiveError when the directory is incomplete or damaged."""
    golden = Golden(folder)
    stored = golden.stored()
    for step in (preprocessing, evaluation, training, inference, dense_crfs):
        for name, ours in step(golden):
            limit = limit_of(name)
            for part in [part for part in stored if whole(part) == name]:
                yield Row(part, difference(sampled(ours, part), stored.pop(part), limit.measure), limit)
    yield from (Row(part, float("nan"), limit_of(whole(part))) for part in stored)


_EVERY = re.compile(r"\[::(\d+)\]$")


def whole(name: str) -> str:
    """Return the name of the full tensor: NAME for "NAME[::7]" and for "NAME"."""
    return _EVERY.sub("", name)


def sampled(tensor: Tensor, name: str) -> Tensor:
    """Return the part of a tensor that is stored under `name`: every 7th element for "NAME[::7]", else all of it."""
    every = _EVERY.search(name)
    return tensor.flatten()[:: int(every[1])] if every else tensor


def limit_of(name: str) -> Limit:
    return next(limit for pattern, limit in LIMITS if re.search(pattern, name))


def difference(ours: Tensor, stored: Tensor, measure: str) -> float:
    """Return the difference of ours to the stored tensor, which may hold only the first images. NaN in either gives NaN."""
    ours, stored = ours[: len(stored)].double() if stored.ndim else ours.double(), stored.double()
    if ours.shape != stored.shape:
        return float("inf")
    gap = (ours - stored).abs()
    if measure == "share":
        return (gap > 0).double().mean().item()
    # A gradient with a norm below 1e-3 is rounding noise, such as that of biases before a BatchNorm.
    if measure == "L2":
        return (gap.norm() / stored.norm().clamp(min=1e-3)).item()
    return (gap / stored.abs().clamp(min=1e-3) if measure == "relative" else gap).max().item()


def table(rows: Sequence[Row]) -> Table:
    """Return the comparison as a table."""

    def verdict(row: Row) -> str:
        return "ok" if row.passed else "not computed" if row.difference != row.difference else "FAILED"

    cells = [(row.name, f"{row.difference:.1e}", f"{row.limit.value:.0e}", row.limit.measure, verdict(row)) for row in rows]
    return Table("", ("", "difference", "limit", "measure", "verdict"), cells)
