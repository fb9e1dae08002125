"""Compare the towers of every model of open_clip with open_clip's own forward, and write the table of docs/weights.md.

    python benchmarks/clips.py > table.md

The weights are random, in towers of their own width, patch, image size and text length, but of four blocks, so that the largest
needs 2 GiB of memory. Per-patch embeddings are compared with open_clip's norm and projection of its last tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from weakclip import cli
from weakclip.config import ClipConfig, ConfigError
from weakclip.models import timm_vit
from weakclip.models.architectures import build, check, named, open_clip
from weakclip.models.clip import TextTower, VisionTower, tokenize

timm = open_clip.timm_model.timm

BLOCKS = 4
TEXTS = ("cat", "traffic light", "a photo of a train")


def reference(architecture: dict[str, Any]) -> tuple[Any, Any]:
    """Return open_clip's own CLIP with BLOCKS blocks and random weights, and ours with the same weights."""
    torch.manual_seed(0)
    vision, text = (architecture[tower] | {"layers": BLOCKS} for tower in ("vision_cfg", "text_cfg"))
    shallow = {**architecture, "vision_cfg": vision, "text_cfg": text}
    name, trunk = vision.get("timm_model_name"), timm_vit.trunk_of(architecture)
    if trunk is None:
        ours = build(shallow, "clip.model").eval()
        return ours, ours
    trunk = trunk._replace(settings=trunk.settings | {"layers": BLOCKS})
    with mock.patch.dict(timm_vit.TRUNKS, {name: trunk}):
        ours = build(shallow, "clip.model").eval()
    with mock.patch.object(timm, "create_model", partial(timm.create_model, depth=BLOCKS)):
        theirs = open_clip.CustomTextCLIP(**{k: v for k, v in shallow.items() if k != "custom_text"}).eval()
    for parameter in theirs.parameters():  # biases and projections that are almost 0 would hide a mistake
        parameter.data += 0.01 * torch.randn_like(parameter)
    vision = timm_vit.to_open_clip(theirs.visual.trunk.state_dict(), trunk)
    assert vision is not None
    ours.visual.load_state_dict(vision)
    ours.load_state_dict(theirs.text.state_dict(), strict=False)
    return theirs, ours


@torch.no_grad()
def differences(architecture: dict[str, Any]) -> Iterator[float]:
    """Yield the largest absolute difference of all tokens, of the image's embedding, of the patches' and of the texts'."""
    theirs, ours = reference(architecture)
    side = architecture["vision_cfg"]["image_size"]
    vision = VisionTower(ours.visual, ClipConfig(image_size=side, double_class_embedding=False))
    images_B3HW, texts_KL = torch.randn(1, 3, side, side), tokenize(TEXTS, architecture["text_cfg"].get("context_length", 77))
    want = theirs.visual.forward_intermediates(images_B3HW, indices=list(range(BLOCKS)))
    found, taps = vision(images_B3HW), want["image_intermediates"]
    yield max(largest(tap, tokens) for tap, tokens in zip(found.taps, taps, strict=True))
    yield largest(found.global_BE, want["image_features"])
    last_BLD = taps[-1].flatten(2).mT
    if trunk := getattr(theirs.visual, "trunk", None):
        yield largest(found.visual_BEhw.flatten(2).mT, trunk.head(trunk.norm(last_BLD)))
    else:
        yield largest(found.visual_BEhw.flatten(2).mT, theirs.visual.ln_post(last_BLD) @ theirs.visual.proj)
    text = TextTower(ours, texts_KL.shape[1])
    yield largest(text(texts_KL, torch.zeros(0, text.width)), theirs.encode_text(texts_KL))


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def row(name: str) -> str:
    """Return a model's line of the table."""
    architecture = named(name)
    try:
        check(architecture, "")
    except ConfigError as error:
        return f"| {name} | {str(error).rpartition('supported: ')[2].removeprefix(': ')} |"
    return f"| {name} | supported; " + ", ".join(f"{value:.1e}" for value in differences(architecture)) + " |"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models of open_clip; by default all")
    names = parser.parse_args(arguments).names or open_clip.list_models()
    print("| `clip.model` | supported, with the differences of tokens, image, patches, texts; or the reason why not |\n|---|---|")
    for name in names:
        print(row(name), flush=True)


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
