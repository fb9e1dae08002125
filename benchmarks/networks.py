"""Measure the cost of the networks for retraining: parameters, and time and memory of a forward and a backward pass.

    python benchmarks/networks.py --side 512 --classes 21 resnet38 segmenter segformer/b2

Each network is measured in a separate process, so that the peak memory is its own: that of the GPU or, without one, the process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from weakclip.config import AugmentConfig, Config, RetrainConfig
from weakclip.networks.wrappers import build_segmentation
from weakclip.registry import NETWORKS

HEADER = ("network", "backbone", "parameters", "of the head", "logits", "seconds", "peak GiB")


def measure(spec: str, side: int, classes: int, batch: int, rounds: int) -> list[str]:
    """Return one row of the table. spec: NETWORK or NETWORK/BACKBONE. The time is the minimum over the rounds."""
    name, _, backbone = spec.partition("/")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = Config(retrain=RetrainConfig(name, backbone or None, augment=AugmentConfig(crop=side)))
    network = build_segmentation(config, classes, pretrained=False).network.to(device).train()
    images_B3HW = torch.randn(batch, 3, side, side, device=device)
    labels_BHW = torch.randint(classes, (batch, side, side), device=device)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        logits_BKhw = network(images_B3HW)
        logits_BKHW = F.interpolate(logits_BKhw, size=(side, side), mode="bilinear", align_corners=False)
        F.cross_entropy(logits_BKHW, labels_BHW).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    whole, head = (sum(parameter.numel() for parameter in some) for some in (network.parameters(), network.head_parameters()))
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident
    shape = " x ".join(map(str, logits_BKhw.shape))
    return [
        name, backbone or NETWORKS[name].published, f"{whole:,}", f"{head:,}", shape, f"{min(times):.2f}", f"{memory / 2**30:.2f}"
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="NETWORK or NETWORK/BACKBONE")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--classes", type=int, default=21)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--row", action="store_true", help="measure one network in this process and print its row as JSON")
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.networks[0], args.side, args.classes, args.batch, args.rounds)))
        return
    settings = [f"--{key}={getattr(args, key)}" for key in ("side", "classes", "batch", "rounds")]
    rows = [HEADER]
    for spec in args.networks:
        done = subprocess.run([sys.executable, __file__, "--row", *settings, spec], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
