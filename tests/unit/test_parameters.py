"""The printed parameter counts are those of the paper."""

from __future__ import annotations

import pytest
import torch

from weakclip import parameters

SAME = {
    "vision tower (frozen)": 86_828_544,
    "text tower (frozen)": 63_395_328,
    "pyramid adapter": 7_087_872,
    "prompts": 8 * 512,
    "alpha, beta": 2 * 512,
    "co-attention": 6_840_832,
}
VOC = {"FPN neck": 3_169_280, "semantic-FPN head": 4_137_749}
COCO = {"FPN neck": 3_169_280 + 4 * 60 * 256, "semantic-FPN head": 4_137_749 + 60 * 257}


@pytest.mark.parametrize(
    "classes, own, total",
    [
        ("voc", VOC, "21,240,853 trainable of 171,464,725 (12.4 %)"),
        ("coco", COCO, "21,317,713 trainable of 171,541,585 (12.4 %)"),
    ],
)
def test_the_printed_parameter_counts_are_the_papers(repo, capsys, classes, own, total):
    with torch.device("meta"):  # counting needs no memory for weights
        parameters.main(["--config", str(repo / "configs/voc.yaml"), "clip.pretrained=none", f"classes={classes}"])
    lines = capsys.readouterr().out.splitlines()
    printed = {line[:24].strip(): int(line[24:].replace(",", "")) for line in lines[:-2]}
    assert printed == SAME | own
    assert lines[-2] == total
    assert lines[-1].startswith("4,207,616 of the trainable parameters never get a gradient")
