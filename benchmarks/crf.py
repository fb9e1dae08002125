"""Compare the two engines of the boundary loss' dense CRF: how far they are apart, and how long they take.

    python benchmarks/crf.py --images DIR [--classes 21 81] [--count 16] [--device cuda]

Probabilities are smooth and random, since a trained network's would be of one recipe; images are the first of the folder, at the
64 x 64 pixels of `loss.grid`. The times are of one image; a GPU does several of them at once. The last columns compare bf16
products, as GPUs use them, with fp32.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from weakclip.config import ConfigError
from weakclip.masks.crf import BOUNDARY
from weakclip.masks.mean_field import mean_field
from weakclip.models.losses import boundary_target
from weakclip.runtime import command_line
from weakclip.runtime.tables import Table

GRID = 64


def images_in(folder: Path, count: int) -> Tensor:
    """Return the first images of a folder, uint8 B x 64 x 64 x 3. Raises ConfigError when it has none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".png"))[:count]
    if not files:
        raise ConfigError(f"--images {folder}: there is no .jpg or .png in it")
    small = [np.array(Image.open(file).convert("RGB").resize((GRID, GRID), Image.Resampling.BILINEAR)) for file in files]
    return torch.from_numpy(np.stack(small))


def timed(function: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return the result and the seconds of the faster one of two calls."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        result = function().cpu()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def main(arguments: Sequence[str]) -> None:
    parser = command_line.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--classes", type=int, nargs="+", default=[21, 81], metavar="K")
    parser.add_argument("--count", type=int, default=16, help="number of images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    images_BGG3 = images_in(options.images, options.count).to(device)
    rows = []
    for K in options.classes:
        logits = 3 * torch.randn(len(images_BGG3), K, 8, 8, generator=torch.Generator().manual_seed(0))
        probs_BKGG = F.interpolate(logits, size=(GRID, GRID), mode="bicubic").softmax(1).to(device)
        exact, exact_s = timed(partial(boundary_target, probs_BKGG, images_BGG3, "exact"))
        lattice, lattice_s = timed(partial(boundary_target, probs_BKGG, images_BGG3, "lattice"))
        same = 100 * (exact.argmax(1) == lattice.argmax(1)).float().mean().item()
        each = [1e3 * seconds / len(images_BGG3) for seconds in (exact_s, lattice_s)]
        floored_BKGG = probs_BKGG.clamp(min=1e-4)
        fp32, bf16 = (mean_field(floored_BKGG, images_BGG3, BOUNDARY, products) for products in (torch.float32, torch.bfloat16))
        near = 100 * (fp32.argmax(1) == bf16.argmax(1)).float().mean().item(), f"{(fp32 - bf16).abs().max().item():.4f}"
        rows.append((K, same, f"{(exact - lattice).abs().mean().item():.4f}", *each, *near))
    header = ("classes", "same likeliest class (%)", "mean |difference|", "exact (ms)", "lattice (ms)")
    header += ("bf16: same (%)", "max |difference|")
    print(Table(f"{len(images_BGG3)} images on {device}", header, rows))


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
