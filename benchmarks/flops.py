"""Count the operations of a training step by part of the model, and what a GPU's peak rate makes of them.

    python benchmarks/flops.py --config configs/voc.yaml

An operation is a multiplication or an addition. The floor is the time of these operations at the peak rate of bf16 products.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from weakclip import cli, labels
from weakclip.models.weakclip import WeakCLIP
from weakclip.runtime.tables import Table
from weakclip.training import flops


def by_part(model: WeakCLIP, crop: int) -> dict[str, int]:
    """Return the operations of the forward pass of each part, for one image."""
    image_13HW = torch.zeros(1, 3, crop, crop)
    counts = {}

    def counted(name, function, *arguments):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            result = function(*arguments)
        counts[name] = counter.get_total_flops()
        return result

    features = counted("vision tower", model.clip.vision, image_13HW)
    text_KE = counted("text tower, once a batch", model.encode_names)
    scores = counted("matching", model.matching, text_KE, features.global_BE, features.visual_BEhw)
    levels = counted("adapter", model.adapter, features.taps)
    maps = counted("neck, with the last doublings", model.decoder.neck, levels, scores)
    counted("head", model.decoder.head, maps)
    return counts


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config, _ = cli.parse_config(parser, arguments)
    if config.clip.model is not None:
        config.clip.pretrained = "none"
    model = WeakCLIP(config, labels.class_names(config.classes)).eval()
    counts = by_part(model, config.augment.crop)
    whole = flops.per_image(model, config.augment.crop, config.train.batch)
    counts |= {f"forward and backward, batch {config.train.batch}": whole}
    print(Table("", ("part", "GFLOP an image"), [(name, count / 1e9) for name, count in counts.items()]))
    for name, rate in flops.PEAKS.items():
        print(f"{name}: at least {1e3 * whole / rate:.2f} ms an image, at most {rate / whole:,.0f} images/s")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
