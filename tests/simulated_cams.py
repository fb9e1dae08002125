"""Simulate class activation maps: ground-truth masks are shrunk, shifted and blurred until they are as wrong as real CAMs.

They are a test fixture for use without a network's CAMs. They are made from the ground truth, so scores based on them say
nothing about the method.

    python tests/simulated_cams.py --images COCO/train2014 --annotations COCO/annotations/instances_train2014.json --out CAMS
"""

from __future__ import annotations

import argparse
import io
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from weakclip.datasets.coco import coco_items
from weakclip.datasets.loading import load_item
from weakclip.labels import COCO, class_map


def simulated_cam(mask_HW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float32 H x W in 0..1 from one class' boolean mask."""
    side = np.sqrt(mask_HW.sum())
    erode = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * int(0.14 * side) + 1,) * 2)
    core_HW = cv2.erode(mask_HW.astype(np.uint8), erode)
    core_HW = core_HW if core_HW.any() else mask_HW.astype(np.uint8)
    dy, dx = rng.uniform(-0.32, 0.32, 2) * side
    shift = np.array([[1, 0, dx], [0, 1, dy]], np.float32)
    shifted_HW = cv2.warpAffine(core_HW.astype(np.float32), shift, mask_HW.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
    blurred_HW = cv2.GaussianBlur(shifted_HW, (0, 0), max(1.0, 0.28 * side))
    return blurred_HW / max(float(blurred_HW.max()), 1e-6)


def write(images: Path, annotations: Path, out: Path, exact: bool) -> None:
    """One KEY.npy an image: {foreground class from 0: map}; or, exact, one KEY.png: the ground truth, as a seed mask."""
    out.mkdir(parents=True, exist_ok=True)
    for item in coco_items(images, annotations, COCO, with_masks=True).items:
        sample = load_item(item, class_map(COCO, COCO))
        if not sample.classes:
            continue
        if exact:
            (out / f"{sample.key}.png").write_bytes(sample.mask)
            continue
        mask_HW = np.array(Image.open(io.BytesIO(sample.mask)))
        rng = np.random.default_rng(zlib.crc32(sample.key.encode()))
        maps = {index - 1: simulated_cam(mask_HW == index, rng) for index in sample.classes}
        np.save(out / f"{sample.key}.npy", maps, allow_pickle=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("images", "annotations", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--exact", action="store_true", help="the masks themselves, as KEY.png, for seeds")
    write(**vars(parser.parse_args()))
