"""Segment images with a trained network: masks, overlays, and a sheet to look at.

weakclip predict runs/voc photo.jpg more_photos [--labels cat,dog] [--out predictions]
weakclip predict runs/voc/retrain/segformer photo.jpg
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from tqdm import tqdm

from weakclip import registry
from weakclip.config import EXIF, ConfigError
from weakclip.data.sample import UnreadableImageError
from weakclip.datasets.files import find_images, name_of
from weakclip.evaluation import visualize
from weakclip.masks import mask_folder
from weakclip.runtime.command_line import Parser, output_folder, run
from weakclip.runtime.run_dir import RunDir

if TYPE_CHECKING:
    from weakclip.api import Prediction  # imports torch

SHEET = 24
"""Number of images on the sheet."""

_log = logging.getLogger(__name__)


def images(paths: Sequence[Path]) -> dict[str, Path]:
    """Return the images that the paths name, and those in folders and below them, by name.

    Raises ConfigError for a path that does not exist, and when two images have one name.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path}: no such image or folder")
        folder = path if path.is_dir() else path.parent
        for image in find_images(path, recursive=True).values() if path.is_dir() else (path,):
            if (other := found.setdefault(name_of(image, folder), image)) != image:
                raise ConfigError(f"{image}: has the same name without its suffix as {other}; predict them one after the other")
    if not found:
        raise ConfigError(f"{paths[0]}: holds no JPEG, PNG or WebP image")
    return found


def write(name: str, found: Prediction, out: Path) -> visualize.Row:
    """Write masks/NAME.png and overlays/NAME.jpg into `out`, and return the row of a sheet, whose images are small."""
    overlay = out / "overlays" / f"{name}.jpg"
    overlay.parent.mkdir(parents=True, exist_ok=True)
    mask_folder.save(found.mask_HW, mask_folder.mask_path(out / "masks", name))
    drawn_HW3 = visualize.overlay(found.image_HW3, found.mask_HW)
    Image.fromarray(drawn_HW3).save(overlay, quality=90)
    shown = [found.classes.index(one) for one in found.found]
    shown_HW3 = (found.image_HW3, drawn_HW3, visualize.colour_mask(found.mask_HW))
    return visualize.Row(name, shown, [visualize.thumbnail(image_HW3) for image_HW3 in shown_HW3])


def main(arguments: Sequence[str]) -> None:
    parser = Parser(prog="weakclip predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run directory: runs/NAME, or runs/NAME/retrain/NETWORK")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE|FOLDER", help="images, and folders with images in them")
    parser.add_argument("--weights", default="best", metavar="best|last|FILE", help="which weights (default: best)")
    parser.add_argument("--labels", metavar="NAME,...", help="the classes that all of the images show (default: any)")
    parser.add_argument("--exif", choices=EXIF, help="how photos with an EXIF orientation are used (default: as in the recipe)")
    parser.add_argument("--out", type=output_folder, metavar="DIR", help="where the results go (default: RUN/predictions)")
    options = parser.parse_args(arguments)
    labels = options.labels.split(",") if options.labels else None
    place = RunDir.existing(options.run)
    place.find_weights(options.weights)  # raises UserError before anything takes seconds
    found, out = images(options.images), options.out or place.root / "predictions"
    network = registry.load("weakclip.api:load")(place.root, options.weights, options.exif)
    rows, bad = list[visualize.Row](), 0
    for name, path in tqdm(found.items(), "predict", unit=" images", disable=None):
        try:
            row = write(name, network.predict(path, labels), out)
        except UnreadableImageError as error:
            bad += 1
            _log.error("%s", error)
            continue
        rows += [row] if len(rows) < SHEET else []
    visualize.sheet(rows, network.classes, ("image", "overlay", "mask")).save(out / "sheet.png")
    print(f"{out}: masks and overlays of {len(found) - bad} images; look at {out / 'sheet.png'}")
    if bad:
        sys.exit(f"error: {bad} of {len(found)} images cannot be read")


if __name__ == "__main__":
    run(main)
