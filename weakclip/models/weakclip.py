"""WeakCLIP: a frozen CLIP and the modules that are trained around it (Zhu et al., IJCV 2025, section 3)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from weakclip.config import Config, ConfigError
from weakclip.masks.sliding_window import Predictor
from weakclip.models.adapter import PyramidAdapter
from weakclip.models.clip import FrozenClip, tokenize
from weakclip.models.decoder import TextGuidedDecoder
from weakclip.models.interface import Targets, Trained
from weakclip.models.losses import LossInputs, weighted_losses
from weakclip.models.matching import CoAttentionMatching
from weakclip.models.precision import autocast, computes_in_bf16, to_bf16


class Output(NamedTuple):
    """What a forward pass returns."""

    logits_BKhw: Tensor
    """At a quarter of the image's side (patch 16)."""
    scores_BKhw: Tensor
    """Score map in -1..1, one value per token and class, without those of `matching.extra_names`."""


class WeakCLIP(Trained):
    """The whole model. Its registered parameters are exactly the paper's trainable part.

    The frozen CLIP is kept outside the module tree: whatever iterates over the parameters (optimizer, ZeRO's partitioning and
    broadcasts, state dicts and so checkpoints) never sees it, and so can neither change, shard nor save it.
    """

    def __init__(self, config: Config, class_names: Sequence[str], strict: bool = True) -> None:
        """strict: see FrozenClip."""
        super().__init__()
        fixed = config.prompts.words
        words_N = tokenize([fixed])[0, 1:-1] if fixed else torch.zeros(config.prompts.length, dtype=torch.int64)
        clip = FrozenClip(config.clip, len(words_N), strict)
        self._frozen = (clip,)
        names = [*class_names, *config.matching.extra_names]
        self.names_KL = tokenize(names, config.clip.name_tokens)
        self.precision, self.loss, self.boundary = config.precision, config.loss, config.boundary
        self.normalisation = clip.normalisation("clip.normalisation", config.clip.normalisation)
        self.num_classes = len(class_names)
        self.prompts_ND = nn.Parameter(nn.init.trunc_normal_(torch.empty(len(words_N), clip.text.width)))
        if fixed:
            self.prompts_ND.requires_grad_(False).copy_(clip.text.token_embedding(words_N))
            if not self.prompts_ND.any(1).all():  # small CLIPs hold only the tokens that they were trained on
                raise ConfigError(f"prompts.words: this CLIP was not trained with a word of {fixed!r}; use other words")
        self.adapter = PyramidAdapter(clip.vision.width).requires_grad_(config.adapter.train)
        self.matching = CoAttentionMatching(clip.embedding, config.matching)
        self.decoder = TextGuidedDecoder(clip.vision.width, len(names), self.num_classes, config.decoder)
        if not config.decoder.score_map:  # then the texts have no effect
            self.prompts_ND.requires_grad_(False)
            self.matching.requires_grad_(False)

    @property
    def clip(self) -> FrozenClip:
        """The frozen CLIP."""
        return self._frozen[0]

    @property
    def frozen(self) -> int:
        """Number of parameters of the CLIP."""
        return sum(p.numel() for p in self.clip.parameters())

    def twin(self) -> WeakCLIP:
        return copy.deepcopy(self, {id(self.clip): self.clip})

    def cast_frozen(self) -> None:
        if computes_in_bf16(self.precision, self.names_KL.device):
            to_bf16(self.clip)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeakCLIP:
        self.clip._apply(fn)  # so that .to(device) also moves the frozen part
        self.names_KL = fn(self.names_KL)
        return super()._apply(fn, recurse)

    def encode_names(self) -> Tensor:
        """Return the embeddings of classes and extra names, K x E: the same for every image, so inference computes them once."""
        with autocast(self.precision, self.names_KL.device):
            return self.clip.text(self.names_KL, self.prompts_ND)

    def predictor(self) -> Predictor:
        """Return the model for inference. The text tower runs only here. The pyramid cannot halve a side under two patches."""
        with torch.no_grad():
            text_KE = self.encode_names()
        device, least_side = text_KE.device, 2 * self.clip.vision.patch
        return Predictor(lambda x: self(x, text_KE).logits_BKhw, self.num_classes, self.normalisation, least_side, device)

    def forward(self, images_B3HW: Tensor, text_KE: Tensor | None = None) -> Output:
        """Return logits and score map of normalised images whose sides are at least one patch. In training mode the frozen vision
        tower's stochastic depth is active, as published."""
        with autocast(self.precision, images_B3HW.device):
            features = self.clip.vision(images_B3HW, drop_path=self.training)
            text_KE = self.encode_names() if text_KE is None else text_KE
            scores_BKhw = self.matching(text_KE, features.global_BE, features.visual_BEhw)
            logits_BKhw = self.decoder(self.adapter(features.taps), scores_BKhw)
            return Output(logits_BKhw, scores_BKhw[:, : self.num_classes])

    def losses(self, output: Output, targets: Targets) -> dict[str, Tensor]:
        """Return the weighted losses of weakclip.models.losses by name; training minimises their sum."""
        inputs = LossInputs(*output, targets.seeds_BHW, targets.images_B3HW, self.loss, self.boundary, self.normalisation)
        return weighted_losses(inputs)


def parameter_counts(model: WeakCLIP) -> dict[str, int]:
    """Return the number of parameters by part, then "trainable" (all but CLIP's), "without gradient" (those of the trainable ones
    that get none) and "total"."""
    parts: dict[str, Any] = {
        "vision tower (frozen)": model.clip.vision,
        "text tower (frozen)": model.clip.text,
        "pyramid adapter": model.adapter,
        "prompts": [model.prompts_ND],
        "alpha, beta": [model.matching.alpha, model.matching.beta],
        "co-attention": model.matching,
        "FPN neck": model.decoder.neck,
        "semantic-FPN head": model.decoder.head,
    }
    counts = {name: sum(p.numel() for p in _parameters(part)) for name, part in parts.items()}
    counts["co-attention"] -= counts["alpha, beta"]
    counts["trainable"] = sum(p.numel() for p in model.parameters())
    counts["without gradient"] = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    counts["total"] = counts["trainable"] + model.frozen
    return counts


def _parameters(part: nn.Module | list[nn.Parameter]) -> list[nn.Parameter]:
    return list(part.parameters()) if isinstance(part, nn.Module) else part
