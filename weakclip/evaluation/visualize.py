"""Visualisations: masks in palette colours, activation maps as heat maps, and sheets of labelled rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from weakclip.data.names import printable
from weakclip.labels import IGNORE, palette

TILE_W, TILE_H, CAPTION_H = 240, 180, 22
COLOURS = np.array(palette(), np.uint8).reshape(-1, 3)
COLOURS[IGNORE] = 255


def colour_mask(mask_HW: np.ndarray) -> np.ndarray:
    """Return a mask in palette colours, uint8 H x W x 3. Ignored pixels are white."""
    return COLOURS[mask_HW]


def overlay(image_HW3: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """Return the image with a mask's classes over it, uint8 H x W x 3. Background stays as it is."""
    mixed_HW3 = image_HW3 // 2 + colour_mask(mask_HW) // 2
    return np.where((mask_HW > 0)[..., None], mixed_HW3, image_HW3)


def heat(image_HW3: np.ndarray, maps_nHW: np.ndarray) -> np.ndarray:
    """Return the image blended with its strongest activation map (0..1, blue to red): uint8 H x W x 3.

    maps_nHW: float32, in 0..1.
    """
    strongest_HW = maps_nHW.max(0) if len(maps_nHW) else np.zeros(image_HW3.shape[:2], np.float32)
    heat_HW3 = cv2.applyColorMap((255 * strongest_HW).astype(np.uint8), cv2.COLORMAP_TURBO)[..., ::-1]
    return image_HW3 // 2 + heat_HW3 // 2


def thumbnail(image_HW3: np.ndarray) -> np.ndarray:
    """Return an image resized to fit into a tile of a sheet, uint8 h x w x 3."""
    return np.asarray(ImageOps.contain(Image.fromarray(image_HW3), (TILE_W - 4, TILE_H - 4), Image.Resampling.BILINEAR))


@dataclass(frozen=True)
class Row:
    """One row of a sheet: images (uint8 H x W x 3) under a caption with the classes beside their colours."""

    name: str
    classes: Sequence[int]
    pictures: Sequence[np.ndarray]


def sheet(rows: Sequence[Row], names: Sequence[str], columns: Sequence[str] = ()) -> Image.Image:
    """Draw all rows on one white page. columns: headings of the images."""
    row_h, top = TILE_H + CAPTION_H, CAPTION_H if columns else 0
    page = Image.new("RGB", (TILE_W * max([3, *(len(row.pictures) for row in rows)]), max(1, top + row_h * len(rows))), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for column, heading in enumerate(columns):
        draw.text((column * TILE_W + 4, 4), heading, "black", font)
    for row in rows:
        _caption(draw, font, row, names, top)
        for column, picture in enumerate(row.pictures):
            page.paste(Image.fromarray(thumbnail(picture)), (column * TILE_W + 2, top + CAPTION_H))
        top += row_h
    return page


def _caption(
    draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, row: Row, names: Sequence[str], top: int
) -> None:
    caption = printable(row.name)
    draw.text((4, top + 4), caption, "black", font)
    left = 16 + int(draw.textlength(caption, font))
    for index in row.classes:
        draw.rectangle((left, top + 6, left + 10, top + 16), tuple(COLOURS[index].tolist()))
        draw.text((left + 14, top + 4), names[index], "black", font)
        left += 26 + int(draw.textlength(names[index], font))
