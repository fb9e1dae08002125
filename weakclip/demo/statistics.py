"""Print the number and size of objects in the synthetic world's images: the figures of docs/demo_world.md.

python -m weakclip.demo.statistics [--seed 0] [--count 2000]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weakclip import cli
from weakclip.demo import world
from weakclip.runtime.tables import Table


def statistics(seed: int, count: int) -> Table:
    """Return statistics of the first `count` images of a world. No image shows two objects of a class."""
    pictures = [world.picture(seed, index) for index in range(count)]
    objects = np.array([len(picture.classes) for picture in pictures])
    areas = np.array([100 * np.mean(picture.mask == k) for picture in pictures for k in picture.classes])
    small, middle, large = np.percentile(areas, [10, 50, 90])
    clutter = [any(name in picture.captions for name in world.CLUTTER) for picture in pictures]
    rows = [
        ("objects per image", float(objects.mean())),
        *((f"images with {n} of them, %", 100 * float(np.mean(objects == n))) for n in np.unique(objects)),
        ("images with clutter, %", 100 * float(np.mean(clutter))),
        ("foreground, % of the pixels", 100 * float(np.mean([picture.mask > 0 for picture in pictures]))),
        ("an object, % of its image: mean", float(areas.mean())),
        ("one in ten is below", float(small)),
        ("half are below", float(middle)),
        ("nine in ten are below", float(large)),
    ]
    return Table(f"{count} images of world {seed}", ("", ""), rows)


def main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(prog="python -m weakclip.demo.statistics", description="Statistics of the synthetic world.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000, help="number of images")
    options = parser.parse_args(arguments)
    print(statistics(options.seed, options.count))


if __name__ == "__main__":
    cli.run(main)
