"""Train a small CLIP on the synthetic world, from images and captions alone, and measure the quality of its tokens.

Contrasting whole images with whole captions soon recognises every class, but leaves the patch tokens nearly useless for
segmentation, since a head is enough to say "cat". Two more objectives make the patches local, still without masks:

* every short phrase ("a striped brown cat", "a red head", "grass") must match some patches of the images that it is
  true of, and no patch of the others;
* every single patch must choose, among all nouns, the one that a CNN trained on those nouns as image labels finds there.

Half of the images are mosaics of four close-ups, each with its own caption, so that a patch that knows its neighbours'
caption but not its own is wrong.

    python -m weakclip.demo.clip --out DIR --minutes 30
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from weakclip import cli
from weakclip.config import ClipConfig
from weakclip.data.photometric import IMAGENET
from weakclip.demo import world
from weakclip.demo.annotator import NOUNS, Annotator, load, multi_hot
from weakclip.demo.image_pool import PROBE_SEED, TEST_SEED, TRAIN_SEED, Captions, Pool, clock, drawing_process, network_input
from weakclip.demo.mimetic_init import SelfAttention, begin_near
from weakclip.demo.resumable import State
from weakclip.evaluation.metrics import Scores, confusion
from weakclip.labels import DEMO
from weakclip.models.architectures import open_clip
from weakclip.models.pretrained import load_clip, pack_tokens

# Shapes: B images, R regions (an image, or one part of a mosaic), L patches, U phrases, N tokens of a text, E
# embedding, D width, K classes, h x w the patch grid.

MODEL_CFG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 192, "layers": 6, "width": 192, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 48, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
}
ANNOTATOR = Path("runs/demo-annotator.safetensors")
TAPS = (1, 2, 3, 5)  # blocks that the probe reads: the method's 3, 5, 7, 11 of twelve, scaled to six


# The shipped file -----------------------------------------------------------------------------------------------------


def row_ids() -> Tensor:
    """Return the token ids of the world's captions, int64 [n], ascending; 0 pads, the last two start and end a text."""
    tokenizer = open_clip.SimpleTokenizer(context_length=16)
    return torch.unique(tokenizer(list(world.words())))


def ship(model: open_clip.CLIP, ids: Tensor, folder: Path) -> None:
    """Write open_clip's local-dir format: open_clip_config.json and open_clip_model.safetensors."""
    preprocess = {"mean": [m / 255 for m in IMAGENET.mean], "std": [s / 255 for s in IMAGENET.std]}
    config = {"model_cfg": MODEL_CFG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(pack_tokens(state, ids), folder / "open_clip_model.safetensors")


# Both towers ----------------------------------------------------------------------------------------------------------


def encode_patches(model: open_clip.CLIP, images_B3HW: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return unit embeddings of the class token [B, E] and the patches [B, L, E], and each block's patch tokens [B, L, D]."""
    tower = model.visual
    h, w = (side // 16 for side in images_B3HW.shape[2:])
    position = tower.positional_embedding  # class token first, then a square grid
    grid = math.isqrt(len(position) - 1)
    patches = position[1:].T.reshape(1, -1, grid, grid)
    if (h, w) != (grid, grid):
        patches = F.interpolate(patches, size=(h, w), mode="bilinear", align_corners=False)
    tokens = tower.conv1(images_B3HW).flatten(2) + patches.flatten(2)
    first = (tower.class_embedding + position[0]).expand(len(tokens), 1, -1)
    tokens = tower.ln_pre(torch.cat([first, tokens.transpose(1, 2)], dim=1))
    blocks = []
    for block in tower.transformer.resblocks:
        tokens = block(tokens)
        blocks.append(tokens[:, 1:])
    embedded = F.normalize(tower.ln_post(tokens) @ tower.proj, dim=-1)
    return embedded[:, 0], embedded[:, 1:], blocks


def encode_texts(model: open_clip.CLIP, ids_UN: Tensor) -> Tensor:
    """Return unit embeddings [U, E] of token ids. Like encode_text, but cut to the longest text instead of the context."""
    end = ids_UN.argmax(dim=1)
    length = int(end.max()) + 1
    tokens = model.token_embedding(ids_UN[:, :length]) + model.positional_embedding[:length]
    tokens = model.transformer(tokens, attn_mask=model.attn_mask[:length, :length])
    ended = model.ln_final(tokens)[torch.arange(len(end)), end]
    return F.normalize(ended @ model.text_projection, dim=-1)


def attentions(tower: Any) -> list[SelfAttention]:
    return [SelfAttention(b.attn.in_proj_weight, b.attn.out_proj.weight, b.attn.num_heads) for b in tower.transformer.resblocks]


# Mosaics --------------------------------------------------------------------------------------------------------------


def mosaics(images: np.ndarray) -> np.ndarray:
    """Join four images into each mosaic, row by row: [4 B, H, W, 3] -> [B, 2 H, 2 W, 3]."""
    count, height, width, _ = images.shape
    tiles = images.reshape(count // 4, 2, 2, height, width, 3)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(count // 4, 2 * height, 2 * width, 3)


def split_mosaics(patches_BLE: Tensor) -> Tensor:
    """Split patches of mosaics [B, L, E] into those of their parts [4 B, L / 4, E], in the order of `mosaics`."""
    count, length, width = patches_BLE.shape
    half = math.isqrt(length) // 2
    parts = patches_BLE.reshape(count, 2, half, 2, half, width).permute(0, 1, 3, 2, 4, 5)
    return parts.reshape(4 * count, half * half, width)


# Objectives -----------------------------------------------------------------------------------------------------------


class Objectives(nn.Module):
    """The objectives on patches, with their learnt scale and offset of scores."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([10.0, 10.0]).log())  # of phrases, of nouns
        self.offset = nn.Parameter(torch.tensor(-4.0))

    def phrases(self, patches_RLE: Tensor, phrases_UE: Tensor, true_RU: Tensor) -> Tensor:
        """Return the loss of phrases: the patches that match a phrase best decide whether it is true of the region."""
        fit_RUL = self.log_scale[0].exp() * phrases_UE @ patches_RLE.transpose(1, 2)
        found_RU = (fit_RUL.softmax(dim=2) * fit_RUL).sum(dim=2) + self.offset
        loss_RU = F.binary_cross_entropy_with_logits(found_RU, true_RU, reduction="none")
        return (loss_RU * true_RU).sum() / true_RU.sum() + (loss_RU * (1 - true_RU)).sum() / (1 - true_RU).sum() * 4

    def nouns(self, patches_RLE: Tensor, nouns_KE: Tensor, places_RLK: Tensor) -> Tensor:
        """Return the loss of patches that choose one noun each. places_RLK: the annotator's share of each noun; sums to 1."""
        choice_RLK = (self.log_scale[1].exp() * patches_RLE @ nouns_KE.T).log_softmax(dim=2)
        return -(places_RLK * choice_RLK).sum(dim=2).mean()


@torch.no_grad()
def noun_places(annotator: Annotator, regions_R3HW: Tensor, true_RK: Tensor) -> Tensor:
    """Return the share of each patch that belongs to each noun of the caption, [R, L, K], by a CNN trained on image labels."""
    maps_RKhw = annotator(regions_R3HW)[:, : len(NOUNS)].masked_fill(true_RK[:, :, None, None] == 0, -math.inf)
    return F.avg_pool2d(maps_RKhw.softmax(dim=1), 2).flatten(2).transpose(1, 2)


def contrast(model: open_clip.CLIP, images_BE: Tensor, texts_BE: Tensor, texts: Sequence[str]) -> Tensor:
    """Return CLIP's symmetric loss. Images with the same caption share the target."""
    same = torch.tensor([[float(a == b) for b in texts] for a in texts])
    target = same / same.sum(dim=1, keepdim=True)
    logits = model.logit_scale.exp().clamp(max=100) * images_BE @ texts_BE.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# Training -------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Images and captions of a step. regions: uint8 [R, H, W, 3]. mosaic: every four regions are the parts of one image."""

    regions: np.ndarray
    captions: list[Captions]
    mosaic: bool


class Trainer:
    """A CLIP in training. Its vocabulary is that of the world; `ship` expands it to open_clip's."""

    peak_lr = 1e-3

    def __init__(self, seed: int, annotator: Annotator) -> None:
        torch.manual_seed(seed)
        self.annotator = annotator
        self.seed, self.step, self.seconds = seed, 0, 0.0
        self.ids = row_ids()
        self.tokenizer = open_clip.SimpleTokenizer(context_length=MODEL_CFG["text_cfg"]["context_length"])
        self.model = open_clip.CLIP(**MODEL_CFG | {"text_cfg": MODEL_CFG["text_cfg"] | {"vocab_size": len(self.ids)}})
        begin_near(attentions(self.model.visual), self.model.visual.positional_embedding[1:])  # type: ignore[index]
        self.objectives = Objectives()
        parameters = [*self.model.parameters(), *self.objectives.parameters()]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.peak_lr, betas=(0.9, 0.98))
        self.parts = {"model": self.model, "objectives": self.objectives, "optimizer": self.optimizer}

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return unit embeddings [U, E]. Token ids become rows in the same order, so a text still ends with the largest."""
        return encode_texts(self.model, torch.searchsorted(self.ids, self.tokenizer(list(texts))))

    def loss(self, batch: Batch, rng: np.random.Generator) -> Tensor:
        images = mosaics(batch.regions) if batch.mosaic else batch.regions
        whole_BE, patches, _ = encode_patches(self.model, network_input(images))
        regions = split_mosaics(patches) if batch.mosaic else patches
        sample = {str(phrase) for own in batch.captions for phrase in rng.choice(own[2:], 4)}
        phrases = sorted(sample | set(NOUNS))
        texts = [] if batch.mosaic else [own[int(rng.random() < 0.3)] for own in batch.captions]
        phrases_UE, true_RU = self.encode(phrases), multi_hot(batch.captions, phrases)
        nouns = [phrases.index(noun) for noun in NOUNS]
        loss = self.objectives.phrases(regions, phrases_UE, true_RU)
        places_RLK = noun_places(self.annotator, network_input(batch.regions), true_RU[:, nouns])
        loss = loss + 2 * self.objectives.nouns(regions, phrases_UE[nouns], places_RLK)
        return loss + contrast(self.model, whole_BE, self.encode(texts), texts) if texts else loss

    def advance(self, batch: Batch, progress: float, rng: np.random.Generator) -> Tensor:
        """Do one step at `progress` (0..1) of the whole training. Returns the loss.

        The learning rate is constant up to 70 %, so a copy of the state from before that can be trained for any length.
        """
        lr = self.peak_lr * min(1.0, (self.step + 1) / 200, (1.01 - progress) / 0.3)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.loss(batch, rng)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.detach()


def train(folder: Path, minutes: float, seed: int, annotator: Annotator) -> Trainer:
    """Train for `minutes` of wall time, or the rest of them after an interruption. The state is in folder/training.pt.

    The first tenth uses single close-ups of half the side; then mosaics of them and whole images alternate.
    """
    trainer = Trainer(seed, annotator)
    state = State(folder / "training.pt", trainer.parts)
    found = state.restore()
    trainer.step, trainer.seconds = int(found.get("step", 0)), found.get("seconds", 0.0)
    rng = np.random.default_rng((seed, trainer.step))
    total = 60 * minutes
    with drawing_process() as worker, clock("demo CLIP", total, trainer.seconds) as bar:
        series = TRAIN_SEED + 1000 * seed + trainer.step  # after an interruption the images are new ones
        close_ups, whole = Pool(worker, series, 96, True, 4, first=4096), Pool(worker, series, 192, False, 2, first=2048)
        while trainer.seconds < total:
            started = time.monotonic()
            loss = trainer.advance(_next_batch(close_ups, whole, trainer, total, rng), trainer.seconds / total, rng)
            passed = time.monotonic() - started
            trainer.seconds += passed
            bar.set_postfix(step=trainer.step, loss=f"{loss:.3f}", steps_per_s=f"{1 / passed:.2f}", refresh=False)
            bar.update(min(total, trainer.seconds) - bar.n)
            state.save(step=trainer.step, seconds=trainer.seconds)
    state.remove()
    return trainer


def _next_batch(close_ups: Pool, whole: Pool, trainer: Trainer, total: float, rng: np.random.Generator) -> Batch:
    if trainer.seconds < 0.1 * total:
        return Batch(*close_ups.take(32, rng), mosaic=False)
    if trainer.step % 2:
        return Batch(*whole.take(12, rng), mosaic=False)
    return Batch(*close_ups.take(32, rng), mosaic=True)


# Quality --------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _encode_world(model: open_clip.CLIP, seed: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encode `count` images: class embedding [B, E], patches [B, L, E], tapped tokens [B, L, 4 D], masks [B, H, W]."""
    pictures = [world.picture(seed, index) for index in range(count)]
    parts = []
    for start in range(0, count, 50):
        images = np.stack([p.image for p in pictures[start : start + 50]])
        whole, patches, blocks = encode_patches(model, network_input(images))
        parts.append((whole, patches, torch.cat([blocks[tap] for tap in TAPS], dim=2)))
    whole_BE, patches_BLE, taps_BLD = (torch.cat(part) for part in zip(*parts, strict=True))
    return whole_BE, patches_BLE, taps_BLD, torch.from_numpy(np.stack([p.mask for p in pictures])).long()


def _upsample(scores_BLK: Tensor, side: int) -> Tensor:
    """Upsample scores of patches [B, L, K] to pixels [B, K, H, W]."""
    grid = math.isqrt(scores_BLK.shape[1])
    scores = scores_BLK.transpose(1, 2).unflatten(2, (grid, grid))
    return F.interpolate(scores, size=(side, side), mode="bilinear", align_corners=False)


def mean_iou(predicted: Tensor, masks: Tensor) -> float:
    """Return the mean IoU in percent over the K classes of labels.DEMO, background included."""
    return 100 * Scores.of(confusion(masks.numpy(), predicted.numpy(), len(DEMO)), DEMO).miou


def average_precision(scores: Tensor, true: Tensor) -> float:
    ranked = true[scores.argsort(descending=True)].double()
    precision = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)
    return float((precision * ranked).sum() / ranked.sum())


def fit_probe(taps_BLD: Tensor, masks_BHW: Tensor, steps: int = 300) -> Callable[[Tensor], Tensor]:
    """Fit a multinomial logistic regression from a patch's tapped tokens to the shares of the classes in its pixels."""
    shares = F.avg_pool2d(F.one_hot(masks_BHW, len(DEMO)).permute(0, 3, 1, 2).float(), 16).flatten(2).transpose(1, 2)
    std, mean = torch.std_mean(taps_BLD, dim=(0, 1))
    probe = nn.Linear(taps_BLD.shape[2], len(DEMO))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=0.01, weight_decay=0.01)
    inputs = ((taps_BLD - mean) / std).flatten(0, 1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(probe(inputs), shares.flatten(0, 1)).backward()
        optimizer.step()
    return lambda tokens_BLD: probe((tokens_BLD - mean) / std)


def quality(model: open_clip.CLIP) -> dict[str, float]:
    """Return three scores in percent on 200 unseen images.

    image_map: mean average precision of the class token against "a photo of a cat" and so on.
    matching_miou: each patch takes the closest noun among the classes, backgrounds and clutter; the latter two count as
    background. probe_miou: a linear probe of the tapped tokens, fitted to the exact masks of 300 other images.
    """
    tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
    whole, patches, taps, masks = _encode_world(model, TEST_SEED, 200)
    _, _, probe_taps, probe_masks = _encode_world(model, PROBE_SEED, 300)
    probe = fit_probe(probe_taps, probe_masks)
    with torch.inference_mode():
        scores_BK = whole @ encode_texts(model, tokenizer([f"a photo of a {name}" for name in DEMO[1:]])).T
        matched = _upsample(patches @ encode_texts(model, tokenizer(list(NOUNS))).T, masks.shape[1]).argmax(dim=1) + 1
        probed = _upsample(probe(taps), masks.shape[1]).argmax(dim=1)
    present = [(masks == k).flatten(1).any(dim=1) for k in range(1, len(DEMO))]
    image_map = np.mean([average_precision(s, true) for s, true in zip(scores_BK.T, present, strict=True)])
    figures = {
        "image_map": 100 * float(image_map),
        "matching_miou": mean_iou(matched.where(matched < len(DEMO), 0), masks),
        "probe_miou": mean_iou(probed, masks),
    }
    return {name: round(figure, 1) for name, figure in figures.items()}


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(description="Train and measure the synthetic world's small CLIP.")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, quality.json and training state")
    parser.add_argument("--minutes", type=float, default=30, help="wall time of the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--annotator", type=Path, default=ANNOTATOR, help=f"weights of weakclip.demo.annotator ({ANNOTATOR})")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = train(options.out, options.minutes, options.seed, load(options.annotator))
    ship(trainer.model, trainer.ids, options.out)
    trained = load_clip(ClipConfig(None, str(options.out), double_class_embedding=False)).eval()
    figures = quality(trained) | {
        "minutes": options.minutes,
        "steps": trainer.step,
    }
    (options.out / "quality.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    cli.run(main)
