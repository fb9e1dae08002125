"""A small synthetic world: animals and vehicles before textured backgrounds, with exact masks and true captions.

Every image is a pure function of (seed, index, size, close_up), so nothing is stored and any process can draw any image.
An object has a small distinctive part (a head, a roof, a sail) in saturated colours and a large body. All classes and the
backgrounds share the colours of bodies, so only texture and shape identify a body.

    python -m weakclip.demo.world --out sheet.png     # a contact sheet: image | mask
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from weakclip.labels import DEMO, palette
from weakclip.runtime.command_line import Parser, output_file

Region = Callable[[np.ndarray, np.ndarray], np.ndarray]  # object coordinates u (right), v (down) -> inside?
Texture = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]  # u, v, rng -> share of colour 2, 0..1


@dataclass(frozen=True)
class Picture:
    """One image with its mask, classes and captions.

    image: uint8 [H, W, 3]. mask: uint8 [H, W], class indices of labels.DEMO, 0 is background. classes: the foreground
    classes in the mask, ascending. captions: the first describes the whole image; the others are short, and together they
    hold every phrase of their kind that is true here, so a phrase missing from them is false.
    """

    image: np.ndarray
    mask: np.ndarray
    classes: tuple[int, ...]
    captions: tuple[str, ...]


# Colours ------------------------------------------------------------------------------------------------------------

COLOURS = {
    "brown": (124, 82, 48), "grey": (128, 130, 132), "white": (228, 226, 220), "black": (44, 42, 44),
    "tan": (206, 176, 124), "green": (78, 126, 56), "blue": (66, 118, 178), "rust": (162, 82, 58),
    "red": (214, 36, 40), "orange": (244, 138, 28), "yellow": (246, 212, 40), "pink": (240, 130, 168),
    "purple": (136, 60, 168),
}  # fmt: skip
BODY_COLOURS = ("brown", "grey", "white", "black", "tan", "green", "blue", "rust")

# Shapes, in object coordinates: -1..1, v grows downwards, animals and vehicles look to the right ---------------------


def ellipse(u0: float, v0: float, ru: float, rv: float) -> Region:
    return lambda u, v: ((u - u0) / ru) ** 2 + ((v - v0) / rv) ** 2 < 1


def polygon(*corners: tuple[float, float]) -> Region:
    """Return a convex polygon. Its corners are listed clockwise as seen on the screen."""
    edges = list(zip(corners, corners[1:] + corners[:1], strict=True))

    def inside(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        found = np.ones(u.shape, bool)
        for (u0, v0), (u1, v1) in edges:
            found &= (u1 - u0) * (v - v0) - (v1 - v0) * (u - u0) >= 0
        return found

    return inside


def box(left: float, top: float, right: float, bottom: float) -> Region:
    return lambda u, v: (u > left) & (u < right) & (v > top) & (v < bottom)


# Textures -----------------------------------------------------------------------------------------------------------


def _striped(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (np.sin(22 * u + 1.2 * np.sin(5 * v + rng.uniform(0, 6)) + rng.uniform(0, 6)) > 0.1) * 1.0


def _spotted(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    shift = rng.uniform(0, 6, 2)
    return (np.sin(15 * u + 7 * v + shift[0]) * np.sin(15 * v - 7 * u + shift[1]) > 0.35) * 1.0


def _patched(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    a, b, c = rng.uniform(0, 6, 3)
    return (np.sin(6 * u + a) + np.sin(7 * v + b) + np.sin(5 * u - 6 * v + c) > 0.4) * 1.0


def _feathered(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    zigzag = np.abs((u * 3.4 + rng.uniform()) % 1 - 0.5)
    return ((v * 4 + 1.6 * zigzag) % 1 > 0.6) * 1.0


def _scaled(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    row = np.floor(v * 5)
    across, down = (u * 4 + 0.5 * (row % 2)) % 1 - 0.5, v * 5 - row
    return (across**2 * 2.4 + down**2 * 0.8 > 0.5) * 1.0


def _shiny(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.exp(-(((v + 0.12 * u - 0.1) / 0.13) ** 2)) * 0.9


def _wooden(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    row = np.floor(v * 5)
    return ((v * 5 - row < 0.25) | ((u * 1.8 + 0.37 * row) % 1 < 0.08)) * 1.0


def _checked(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return ((np.floor(u * 4.6) + np.floor(v * 4.6)) % 2 == 0) * 0.85


TEXTURES: dict[str, Texture] = {
    "striped": _striped, "spotted": _spotted, "patched": _patched, "feathered": _feathered, "scaled": _scaled,
    "shiny": _shiny, "wooden": _wooden, "checked": _checked, "plain": lambda u, v, rng: np.zeros_like(u),
}  # fmt: skip


# Classes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """How one class looks: regions painted in order, body, then part, then details of fixed colours (RGB 0..255)."""

    body: tuple[Region, ...]
    part: tuple[Region, ...]
    part_name: str
    part_colours: tuple[str, str]
    texture: str
    partner: str
    places: tuple[str, str]  # its typical backgrounds
    details: tuple[tuple[Region, tuple[int, int, int]], ...]


_EYE, _PALE, _GLASS, _TYRE, _HUB = (24, 22, 28), (244, 240, 226), (166, 208, 226), (36, 36, 40), (176, 176, 180)
_BEAK = (250, 168, 30)


def _wheels(v: float, *centres: float) -> tuple[tuple[Region, tuple[int, int, int]], ...]:
    sizes = ((0.22, _TYRE), (0.1, _HUB))
    return tuple((ellipse(u, v, radius, radius), colour) for u in centres for radius, colour in sizes)


KINDS = {
    "cat": Kind(
        body=(ellipse(-0.15, 0.12, 0.66, 0.42), box(-0.62, 0.3, -0.4, 0.88), box(-0.3, 0.3, -0.08, 0.88),
              box(0.12, 0.3, 0.34, 0.88), polygon((-0.98, -0.7), (-0.78, -0.75), (-0.55, 0.05), (-0.75, 0.2))),
        part=(ellipse(0.58, -0.3, 0.38, 0.33), polygon((0.3, -0.95), (0.58, -0.5), (0.26, -0.35)),
              polygon((0.88, -0.95), (0.9, -0.35), (0.6, -0.5))),
        part_name="head", part_colours=("orange", "pink"), texture="striped", partner="dog", places=("brick", "grass"),
        details=((ellipse(0.45, -0.35, 0.08, 0.1), _EYE), (ellipse(0.74, -0.35, 0.08, 0.1), _EYE),
                 (ellipse(0.6, -0.14, 0.09, 0.06), _PALE)),
    ),
    "dog": Kind(
        body=(ellipse(-0.15, 0.05, 0.7, 0.38), box(-0.75, 0.05, -0.52, 0.92), box(-0.38, 0.2, -0.16, 0.92),
              box(0.22, 0.1, 0.46, 0.92), polygon((-0.95, -0.55), (-0.8, -0.6), (-0.6, -0.1), (-0.8, 0.1))),
        part=(ellipse(0.55, -0.38, 0.32, 0.3), ellipse(0.84, -0.25, 0.18, 0.15)),
        part_name="head", part_colours=("yellow", "red"), texture="spotted", partner="cat", places=("grass", "sand"),
        details=((ellipse(0.36, -0.25, 0.13, 0.32), (92, 52, 30)), (ellipse(0.62, -0.46, 0.07, 0.08), _EYE),
                 (ellipse(0.97, -0.29, 0.08, 0.07), _EYE)),
    ),
    "cow": Kind(
        body=(polygon((-0.9, -0.35), (0.5, -0.35), (0.55, 0.4), (-0.85, 0.4)), box(-0.85, 0.3, -0.62, 0.9),
              box(-0.5, 0.3, -0.28, 0.9), box(0.0, 0.3, 0.22, 0.9), box(0.3, 0.3, 0.52, 0.9)),
        part=(polygon((0.42, -0.62), (0.95, -0.62), (0.92, 0.12), (0.55, 0.12)),),
        part_name="head", part_colours=("pink", "white"), texture="patched", partner="bird", places=("grass", "grass"),
        details=((polygon((0.36, -0.98), (0.58, -0.6), (0.44, -0.6)), _PALE),
                 (polygon((1.0, -0.98), (0.94, -0.6), (0.8, -0.6)), _PALE),
                 (ellipse(0.74, 0.02, 0.25, 0.16), (222, 150, 150)), (ellipse(0.58, -0.4, 0.07, 0.08), _EYE),
                 (ellipse(0.83, -0.4, 0.07, 0.08), _EYE)),
    ),
    "bird": Kind(
        body=(ellipse(-0.08, 0.12, 0.6, 0.44), polygon((-1.0, -0.3), (-0.4, -0.05), (-0.45, 0.3), (-1.0, 0.15)),
              polygon((-0.5, -0.75), (0.15, -0.1), (-0.25, 0.05))),
        part=(ellipse(0.5, -0.38, 0.32, 0.3),),
        part_name="head", part_colours=("red", "yellow"), texture="feathered", partner="cow", places=("sky", "sand"),
        details=((polygon((0.76, -0.55), (1.1, -0.34), (0.76, -0.2)), _BEAK), (ellipse(0.56, -0.45, 0.08, 0.08), _EYE),
                 (box(-0.2, 0.5, -0.1, 0.92), _BEAK), (box(0.1, 0.5, 0.2, 0.92), _BEAK)),
    ),
    "fish": Kind(
        body=(ellipse(-0.02, 0, 0.74, 0.48), polygon((-1.0, -0.55), (-0.5, 0), (-1.0, 0.55)),
              polygon((-0.35, -0.4), (-0.2, -0.75), (0.25, -0.4))),
        part=(ellipse(0.52, 0, 0.36, 0.38),),
        part_name="head", part_colours=("orange", "purple"), texture="scaled", partner="boat",
        places=("water", "water"),
        details=((ellipse(0.62, -0.12, 0.12, 0.12), _PALE), (ellipse(0.64, -0.12, 0.06, 0.06), _EYE),
                 (box(0.7, 0.12, 0.9, 0.17), _EYE)),
    ),
    "car": Kind(
        body=(polygon((-1.0, -0.12), (0.7, -0.12), (1.0, 0.08), (1.0, 0.46), (-1.0, 0.46)),),
        part=(polygon((-0.45, -0.6), (0.25, -0.6), (0.6, -0.1), (-0.75, -0.1)),),
        part_name="roof", part_colours=("purple", "red"), texture="shiny", partner="bus", places=("road", "brick"),
        details=((polygon((-0.4, -0.5), (-0.12, -0.5), (-0.12, -0.16), (-0.58, -0.16)), _GLASS),
                 (polygon((0.0, -0.5), (0.2, -0.5), (0.42, -0.16), (0.0, -0.16)), _GLASS),
                 *_wheels(0.46, -0.55, 0.55)),
    ),
    "boat": Kind(
        body=(polygon((-1.0, 0.0), (1.0, 0.0), (0.62, 0.72), (-0.68, 0.72)), box(-0.6, -0.24, 0.0, 0.1)),
        part=(polygon((0.06, -1.0), (0.68, -0.18), (0.06, -0.18)),
              polygon((-0.06, -0.85), (-0.06, -0.24), (-0.4, -0.24))),
        part_name="sail", part_colours=("white", "red"), texture="wooden", partner="fish", places=("water", "water"),
        details=((box(-0.06, -1.0, 0.06, 0.02), (92, 62, 40)),),
    ),
    "bus": Kind(
        body=(box(-1.0, -0.6, 0.9, 0.5),),
        part=(polygon((0.55, -0.6), (0.92, -0.6), (1.0, 0.5), (0.55, 0.5)),),
        part_name="front", part_colours=("yellow", "green"), texture="checked", partner="car", places=("road", "brick"),
        details=(*((box(u, -0.46, u + 0.26, -0.14), _GLASS) for u in (-0.9, -0.54, -0.18, 0.18)),
                 (box(0.64, -0.46, 0.88, -0.1), _GLASS), (ellipse(0.86, 0.3, 0.09, 0.09), _PALE),
                 *_wheels(0.5, -0.6, 0.35)),
    ),
}  # fmt: skip

# Things without a class, so that not everything in the foreground is an object of a class.
CLUTTER: dict[str, tuple[tuple[Region, ...], str, tuple[str, ...]]] = {
    "rock": ((ellipse(-0.1, 0.1, 0.9, 0.6), ellipse(0.3, -0.1, 0.5, 0.6)), "plain", ("grey", "tan", "black")),
    "bush": ((ellipse(-0.4, 0.2, 0.6, 0.5), ellipse(0.4, 0.2, 0.6, 0.5), ellipse(0, -0.3, 0.6, 0.6)), "spotted",
             ("green", "brown")),
    "box": ((box(-0.8, -0.7, 0.8, 0.8),), "wooden", ("brown", "tan", "blue")),
    "ball": ((ellipse(0, 0, 0.8, 0.8),), "striped", ("red", "blue", "white")),
}  # fmt: skip

# Backgrounds --------------------------------------------------------------------------------------------------------

GROUNDS = {"grass": "green", "water": "blue", "brick": "rust", "sand": "tan", "sky": "blue", "road": "grey"}
"""Background -> the body colour that blends in with it."""
ALIKE, SECOND_ALIKE = 0.35, 0.75
"""Probabilities that a body's first and second colour are the background's. They are such that a CRF alone adds only a few
points to the CAMs, as on photographs (docs/demo_world.md)."""


@lru_cache(maxsize=64)
def _interpolation(size: int, cells: int) -> np.ndarray:
    """Return weights [size, cells + 1] that interpolate values at cell corners linearly to `size` pixels."""
    position = np.arange(size) * cells / size
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(cells + 1))).astype(np.float32)


def _noise(rng: np.random.Generator, size: int, cell_y: int, cell_x: int) -> np.ndarray:
    """Return smooth noise [size, size] in -1..1 with features of about `cell_y` x `cell_x` pixels."""
    rows, columns = max(1, size // cell_y), max(1, size // cell_x)
    corners = rng.uniform(-1, 1, (rows + 1, columns + 1)).astype(np.float32)
    return _interpolation(size, rows) @ corners @ _interpolation(size, columns).T


def _ground(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one background, float32 [size, size, 3]."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    shade = 14 * _noise(rng, size, 48, 48)
    base = _rgb(GROUNDS[name]) + rng.uniform(-12, 12, 3).astype(np.float32)
    if name == "grass":
        shade += 26 * _noise(rng, size, 9, 2) + 14 * _noise(rng, size, 5, 3)
    elif name == "water":
        shade += 24 * np.sin(y / rng.uniform(2.2, 3.2) + 2.5 * _noise(rng, size, 16, 24)) + 8
    elif name == "brick":
        row = np.floor(y / 10)
        column = np.floor(x / 22 + 0.5 * (row % 2))
        tint = np.sin(row * 12.9 + column * 78.2 + rng.uniform(0, 6)) * 16
        mortar = (y % 10 < 2) | ((x + 11 * (row % 2)) % 22 < 2)
        shade += np.where(mortar, 62, tint) + 6 * _noise(rng, size, 2, 2)
    elif name == "sand":
        shade += 16 * np.sin(y / 7 + x / 30 + 3 * _noise(rng, size, 40, 40)) + 16 * _noise(rng, size, 2, 2)
    elif name == "sky":
        cloud = np.clip(1.6 * _noise(rng, size, 28, 44) + 0.7 * _noise(rng, size, 10, 14), 0, 1)[..., None]
        return (base + 56) * (1 - cloud) + 238 * cloud + (y[..., None] / size - 0.5) * 36
    else:
        shade += 20 * _noise(rng, size, 2, 2) + 70 * ((np.abs((y - size * 0.7) % 64) < 4) & (x % 40 < 24))
    return base + shade[..., None]


def _scenery(names: Sequence[str], size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw one background, or the first below a wavy horizon and the second above it."""
    canvas = _ground(names[0], size, rng)
    if len(names) > 1:
        horizon = size * rng.uniform(0.2, 0.4) + 5 * _noise(rng, size, size, 32)[:1]
        above = np.arange(size)[:, None] < horizon
        canvas[above] = _ground(names[1], size, rng)[above]
    return canvas


# Objects ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thing:
    """An object or clutter to draw: centre and half side in pixels, rotation `turn` in radians; `flip` -1 faces left."""

    name: str
    x: float
    y: float
    half: float
    flip: float
    turn: float
    texture: str
    colour: str
    second: str
    part_colour: str = ""


def _coordinates(thing: Thing, size: int) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """Return the window of the image that `thing` can touch, and the object coordinates u, v of its pixels."""
    reach = 1.5 * thing.half
    top, left = max(0, int(thing.y - reach)), max(0, int(thing.x - reach))
    window = slice(top, min(size, int(thing.y + reach))), slice(left, min(size, int(thing.x + reach)))
    y, x = np.mgrid[window].astype(np.float32)
    y, x = (y - thing.y) / thing.half, (x - thing.x) / thing.half
    cos, sin = np.cos(thing.turn), np.sin(thing.turn)
    return window, (cos * x + sin * y) * thing.flip, cos * y - sin * x


def _rgb(colour: str) -> np.ndarray:
    return np.array(COLOURS[colour], np.float32)


def _union(regions: Sequence[Region], u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.logical_or.reduce([region(u, v) for region in regions])


def _draw(thing: Thing, canvas: np.ndarray, owner: np.ndarray, number: int, rng: np.random.Generator) -> None:
    """Paint `thing` on canvas [H, W, 3] and write `number` where it is into owner [H, W]."""
    window, u, v = _coordinates(thing, len(canvas))
    target, owned = canvas[window], owner[window]
    tint = rng.uniform(-14, 14, 3).astype(np.float32)

    def paint(inside: np.ndarray, colour: np.ndarray) -> None:
        grain = 5 * rng.standard_normal(np.count_nonzero(inside), np.float32) - 16 * v[inside]
        target[inside] = colour + tint + grain[:, None]
        owned[inside] = number

    kind = KINDS.get(thing.name)
    body = _union(kind.body if kind else CLUTTER[thing.name][0], u, v)
    share = 0.8 * TEXTURES[thing.texture](u[body], v[body], rng)[:, None].astype(np.float32)
    paint(body, _rgb(thing.colour) * (1 - share) + _rgb(thing.second) * share)
    if kind:
        paint(_union(kind.part, u, v), _rgb(thing.part_colour))
        for region, colour in kind.details:
            paint(region(u, v), np.array(colour, np.float32))


def _cast(rng: np.random.Generator, close_up: bool) -> list[str]:
    """Draw the class names of the objects in an image; partners occur together more often than by chance."""
    names = [str(rng.choice(DEMO[1:]))]
    if close_up:
        return names if rng.random() < 0.85 else []
    for _ in range(rng.choice(3, p=(0.4, 0.42, 0.18))):
        others = [name for name in DEMO[1:] if name not in names]
        partner = KINDS[names[0]].partner
        names.append(partner if partner in others and rng.random() < 0.5 else str(rng.choice(others)))
    return names


def _grounds(cast: Sequence[str], rng: np.random.Generator, close_up: bool) -> list[str]:
    """Draw the names of one or two backgrounds, which are typical of the first object in half of the images."""
    typical = cast and rng.random() < 0.5
    names = [str(rng.choice(KINDS[cast[0]].places if typical else list(GROUNDS)))]
    if not close_up and names[0] != "sky" and rng.random() < 0.35:
        names.append("sky")
    return names


def _thing(name: str, size: int, side: tuple[float, float], ground: str, rng: np.random.Generator) -> Thing:
    """Draw a thing of random appearance and position. side: range of its side, as a fraction of the image's."""
    half = size * rng.uniform(*side) / 2
    margin = min(0.85 * half, size / 2 - 1)
    x, y = rng.uniform(margin, size - margin, 2)
    kind = KINDS.get(name)
    if kind:
        texture = kind.texture if rng.random() < 0.8 else str(rng.choice(list(TEXTURES)))
        colour = GROUNDS[ground] if rng.random() < ALIKE else str(rng.choice(BODY_COLOURS))
        part_colour = kind.part_colours[int(rng.random() < 0.4)]
    else:
        texture, colour, part_colour = CLUTTER[name][1], str(rng.choice(CLUTTER[name][2])), ""
    second = GROUNDS[ground] if rng.random() < SECOND_ALIKE else colour
    if second == colour:
        second = str(rng.choice([c for c in BODY_COLOURS if c != colour]))
    turn = rng.uniform(-0.3, 0.3) if name not in ("bus", "car") else rng.uniform(-0.12, 0.12)
    return Thing(name, x, y, half, float(rng.choice((-1, 1))), turn, texture, colour, second, part_colour)


def picture(seed: int, index: int, size: int = 192, *, close_up: bool = False) -> Picture:
    """Draw image `index` of the endless series `seed`. The same arguments give the same image everywhere.

    size: side in pixels. close_up: at most one object, which may reach beyond the frame. seed and index: 0 or more.
    """
    rng = np.random.default_rng((seed, index, close_up))
    cast = _cast(rng, close_up)
    grounds = _grounds(cast, rng, close_up)
    clutter = [str(rng.choice(list(CLUTTER)))] if rng.random() < 0.35 else []
    side = (0.7, 1.3) if close_up else (0.5, 0.75) if len(cast) < 3 else (0.42, 0.62)
    things = [_thing(name, size, side, grounds[0], rng) for name in cast]
    things += [_thing(name, size, (0.2, 0.4), grounds[0], rng) for name in clutter]
    canvas = _scenery(grounds, size, rng)
    things, owner = _compose(things, canvas, rng)
    light = np.float32(rng.uniform(0.85, 1.15)) + 0.1 * _noise(rng, size, size, size)[..., None]
    image = canvas * light + 4 * rng.standard_normal((size, size, 1), np.float32)
    lookup = np.array([0] + [DEMO.index(t.name) if t.name in DEMO else 0 for t in things], np.uint8)
    mask = lookup[owner]
    classes = tuple(int(c) for c in np.flatnonzero(np.bincount(mask.ravel())) if c)
    return Picture(np.clip(image, 0, 255).astype(np.uint8), mask, classes, _captions(things, grounds, size))


def _compose(things: Sequence[Thing], canvas: np.ndarray, rng: np.random.Generator) -> tuple[list[Thing], np.ndarray]:
    """Paint things one over the other; those that would hide most of another are left out. Owner 0 is the background."""
    drawn: list[Thing] = []
    owner = np.zeros(canvas.shape[:2], np.uint8)
    areas: list[int] = []
    for thing in things:
        trial, trial_owner = canvas.copy(), owner.copy()
        _draw(thing, trial, trial_owner, len(drawn) + 1, rng)
        visible = np.bincount(trial_owner.ravel(), minlength=len(drawn) + 2)[1:]
        if visible[-1] and all(visible[:-1] >= 0.5 * np.array(areas)):
            canvas[:], owner = trial, trial_owner
            drawn.append(thing)
            areas.append(int(visible[-1]))
    return drawn, owner


# Captions -----------------------------------------------------------------------------------------------------------


def _spot(thing: Thing, size: int) -> str:
    x, y = thing.x / size, thing.y / size
    return "left" if x < 0.4 else "right" if x > 0.6 else "top" if y < 0.4 else "bottom" if y > 0.6 else "middle"


def _phrases(thing: Thing, size: int) -> list[str]:
    """Return every short phrase that is true of one thing; the first is its name."""
    name, size_word = thing.name, "large" if thing.half > 0.3 * size else "small"
    texture, colour, second = thing.texture, thing.colour, thing.second
    phrases = [name, f"a {colour} {name}", f"a {texture} {name}", f"a {texture} {colour} {name}"]
    if name in KINDS:
        part = f"{thing.part_colour} {KINDS[name].part_name}"
        phrases += [f"a {part}", f"a {name} with a {part}", f"a {texture} {colour} and {second} {name}",
                    f"a {size_word} {name}", f"a {name} at the {_spot(thing, size)}"]  # fmt: skip
    return phrases


def _captions(things: Sequence[Thing], grounds: Sequence[str], size: int) -> tuple[str, ...]:
    objects = [thing for thing in things if thing.name in KINDS]
    scene = f"on a {grounds[0]} background" + (f" under the {grounds[1]}" if grounds[1:] else "")
    described = []
    for number, thing in enumerate(objects):
        size_word = "large" if thing.half > 0.3 * size else "small"
        text = f"a {size_word} {thing.texture} {thing.colour} {thing.name}"
        text += f" with a {thing.part_colour} {KINDS[thing.name].part_name}"
        described.append(text)
        if number + 1 < len(objects):
            after = objects[number + 1]
            described[-1] += " left of" if thing.x < after.x else " right of"
    others = [f"a {thing.colour} {thing.name}" for thing in things if thing.name in CLUTTER]
    whole = " ".join(described) or "a photo"
    whole += f" {scene}" + "".join(f" and {other}" for other in others)
    simple = "a photo of " + (" and ".join(sorted(f"a {thing.name}" for thing in objects)) or f"the {grounds[0]}")
    short = [phrase for thing in things for phrase in _phrases(thing, size)]
    return tuple(dict.fromkeys([whole, simple, *short, *grounds]))


def words() -> tuple[str, ...]:
    """Return the vocabulary of this world's text tower: every word of a caption, and the class names, sorted."""
    glue = {"a", "and", "at", "background", "bottom", "large", "left", "middle", "of", "on", "photo", "right", "small",
            "the", "top", "under", "with"}  # fmt: skip
    parts = [kind.part_name for kind in KINDS.values()]
    return tuple(sorted({*DEMO, *CLUTTER, *GROUNDS, *COLOURS, *TEXTURES, *parts, *glue}))


def contact_sheet(seed: int, columns: int = 4, rows: int = 4, size: int = 192) -> Image.Image:
    """Draw `rows` x `columns` images, each beside its mask in the classes' colours."""
    colours = np.array(palette(), np.uint8).reshape(-1, 3)
    pictures = [picture(seed, index, size) for index in range(rows * columns)]
    tiles = [np.concatenate([p.image, colours[p.mask]], axis=1) for p in pictures]
    tiles = [np.pad(tile, ((2, 2), (2, 2), (0, 0)), constant_values=255) for tile in tiles]
    lines = [np.concatenate(tiles[row * columns : (row + 1) * columns], axis=1) for row in range(rows)]
    return Image.fromarray(np.concatenate(lines))


if __name__ == "__main__":
    parser = Parser(description="Draw a contact sheet of the synthetic world: image | mask.")
    parser.add_argument("--out", type=output_file, required=True, help="PNG to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(arguments.seed).save(arguments.out)
