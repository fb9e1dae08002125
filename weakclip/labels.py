"""Class names, palette and id maps: the one place that knows them.

Class 0 is background everywhere, and 255 means "ignore". A class set is a tuple of names whose position is the class index.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

IGNORE = 255

VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

# COCO's 80 things as (id in the annotation files, name). The ids run from 1 to 90 with ten gaps.
_COCO_THINGS = (
    (1, "person"), (2, "bicycle"), (3, "car"), (4, "motorcycle"), (5, "airplane"), (6, "bus"), (7, "train"),
    (8, "truck"), (9, "boat"), (10, "traffic light"), (11, "fire hydrant"), (13, "stop sign"), (14, "parking meter"),
    (15, "bench"), (16, "bird"), (17, "cat"), (18, "dog"), (19, "horse"), (20, "sheep"), (21, "cow"), (22, "elephant"),
    (23, "bear"), (24, "zebra"), (25, "giraffe"), (27, "backpack"), (28, "umbrella"), (31, "handbag"), (32, "tie"),
    (33, "suitcase"), (34, "frisbee"), (35, "skis"), (36, "snowboard"), (37, "sports ball"), (38, "kite"),
    (39, "baseball bat"), (40, "baseball glove"), (41, "skateboard"), (42, "surfboard"), (43, "tennis racket"),
    (44, "bottle"), (46, "wine glass"), (47, "cup"), (48, "fork"), (49, "knife"), (50, "spoon"), (51, "bowl"),
    (52, "banana"), (53, "apple"), (54, "sandwich"), (55, "orange"), (56, "broccoli"), (57, "carrot"), (58, "hot dog"),
    (59, "pizza"), (60, "donut"), (61, "cake"), (62, "chair"), (63, "couch"), (64, "potted plant"), (65, "bed"),
    (67, "dining table"), (70, "toilet"), (72, "tv"), (73, "laptop"), (74, "mouse"), (75, "remote"), (76, "keyboard"),
    (77, "cell phone"), (78, "microwave"), (79, "oven"), (80, "toaster"), (81, "sink"), (82, "refrigerator"),
    (84, "book"), (85, "clock"), (86, "vase"), (87, "scissors"), (88, "teddy bear"), (89, "hair drier"),
    (90, "toothbrush"),
)  # fmt: skip

# What the gaps were meant for. No annotation uses them, but the released COCO models know them as classes of their own.
_COCO_GAPS = (
    (12, "street sign"), (26, "hat"), (29, "shoe"), (30, "eye glasses"), (45, "plate"), (66, "mirror"), (68, "window"),
    (69, "desk"), (71, "door"), (83, "blender"),
)  # fmt: skip

COCO = ("background", *(name for _, name in _COCO_THINGS))

COCO_GAP_NAMES = tuple(name for _, name in _COCO_GAPS)

COCO_RAW_IDS = (0, *(raw for raw, _ in _COCO_THINGS), *(raw for raw, _ in _COCO_GAPS))
"""Raw id (0..90) of each of COCO's 81 classes, then of the ten gaps: where they stand in a 91-way head."""

COCO_ID_TO_CLASS = {raw: index for index, (raw, _) in enumerate(_COCO_THINGS, start=1)}
"""COCO category id (1..90, with gaps) -> class index (1..80)."""

# The synthetic world of weakclip.demo.
DEMO = ("background", "cat", "dog", "cow", "bird", "fish", "car", "boat", "bus")

CLASS_SETS = {"voc": VOC, "coco": COCO, "demo": DEMO}

# The same things under VOC's and COCO's names; all other names that both have are equal.
_ALIASES = (
    ("aeroplane", "airplane"), ("diningtable", "dining table"), ("motorbike", "motorcycle"), ("pottedplant", "potted plant"),
    ("sofa", "couch"), ("tvmonitor", "tv"),
)  # fmt: skip
_OTHER_NAME = dict(_ALIASES) | {coco: voc for voc, coco in _ALIASES}


def class_names(spec: str) -> tuple[str, ...]:
    """Class names for `spec`: "voc", "coco", "demo", or a text file with one name a line, background first.

    Raises ValueError when `spec` is none of these, or when the file's names are not usable.
    """
    if spec in CLASS_SETS:
        return CLASS_SETS[spec]
    path = Path(spec)
    if not path.is_file():
        raise ValueError(f"classes: {spec!r} is neither {', '.join(CLASS_SETS)} nor a text file with one class name a line")
    names = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    if len(names) < 2 or names[0] != "background":
        raise ValueError(f"{path}: needs at least two lines, the first of which is 'background'")
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: a class name stands in it twice")
    if len(names) > IGNORE:
        raise ValueError(f"{path}: {len(names)} classes; an 8-bit mask holds at most {IGNORE}")
    return names


def find_class(name: str, names: Sequence[str]) -> int | None:
    """Index in `names` of the class called `name`, or by its other name (aeroplane is airplane); None if there is none."""
    return next((names.index(known) for known in (name, _OTHER_NAME.get(name)) if known in names), None)


def class_map(names: Sequence[str], target: Sequence[str]) -> tuple[int, ...]:
    """For each class of `names` its index in the class list `target`; 0, the background, for those that `target` lacks."""
    return tuple(find_class(name, target) or 0 for name in names)


def palette(num_classes: int = 256) -> list[int]:
    """PASCAL VOC's colour map as a flat list of 3 * `num_classes` values: the bits of the index spread over R, G, B."""
    colours = []
    for index in range(num_classes):
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        colours += rgb
    return colours


def check_same(names: Sequence[str], other: Sequence[str], where: str) -> None:
    """Raise ValueError naming `where` when two class lists differ."""
    if tuple(names) != tuple(other):
        raise ValueError(
            f"{where}: its classes are {len(other)} ({', '.join(other[:4])}, ...), not the config's {len(names)} "
            f"({', '.join(names[:4])}, ...); set `classes` to the list the shards were built with"
        )
