"""Class names, palette and id maps, which are defined nowhere else.

Class 0 is background everywhere, and 255 means "ignore". A class set is a tuple of names; a name's position is its class index.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from weakclip.runtime.errors import UserError

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

# Names that were planned for the gaps. No annotation uses them, but the released COCO models treat them as separate classes.
_COCO_GAPS = (
    (12, "street sign"), (26, "hat"), (29, "shoe"), (30, "eye glasses"), (45, "plate"), (66, "mirror"), (68, "window"),
    (69, "desk"), (71, "door"), (83, "blender"),
)  # fmt: skip

COCO = ("background", *(name for _, name in _COCO_THINGS))

COCO_GAP_NAMES = tuple(name for _, name in _COCO_GAPS)

COCO_RAW_IDS = (0, *(raw for raw, _ in _COCO_THINGS), *(raw for raw, _ in _COCO_GAPS))
"""Raw id (0..90) of each of COCO's 81 classes, then of the ten gaps: their positions in a 91-way head."""

COCO_ID_TO_CLASS = {raw: index for index, (raw, _) in enumerate(_COCO_THINGS, start=1)}
"""COCO category id (1..90, with gaps) -> class index (1..80)."""

# The synthetic world of weakclip.demo.
DEMO = ("background", "cat", "dog", "cow", "bird", "fish", "car", "boat", "bus")

DEMO_WORDS = (*DEMO[1:], "ball", "box", "bush", "rock", "grass", "water", "brick", "sand", "sky", "road")
"""Everything there is in that world. The small CLIP that ships with the package knows no other nouns."""

CLASS_SETS = {"voc": VOC, "coco": COCO, "demo": DEMO}

# VOC's and COCO's names of the same classes; all other classes that both have share one name.
_ALIASES = (
    ("aeroplane", "airplane"), ("diningtable", "dining table"), ("motorbike", "motorcycle"), ("pottedplant", "potted plant"),
    ("sofa", "couch"), ("tvmonitor", "tv"),
)  # fmt: skip
_OTHER_NAME = dict(_ALIASES) | {coco: voc for voc, coco in _ALIASES}


def class_names(spec: str) -> tuple[str, ...]:
    """Return the class names for `spec`: "voc", "coco", "demo", or a text file with one name per line, background first.

    Raises UserError when `spec` is none of these, or when the file's names cannot be used.
    """
    if spec in CLASS_SETS:
        return CLASS_SETS[spec]
    path = Path(spec)
    if not path.is_file():
        raise UserError(f"classes: {spec!r} is neither {', '.join(CLASS_SETS)} nor a text file with one class name per line")
    names = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    if len(names) < 2 or names[0] != "background":
        raise UserError(f"{path}: needs at least two class names, one per line, the first of them 'background'")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: a class name is listed twice; each must be unique")
    if len(names) > IGNORE:
        raise UserError(f"{path}: {len(names)} classes; an 8-bit mask holds at most {IGNORE}")
    return names


def read_text(path: Path, error: type[UserError] = UserError) -> str:
    """Return a text file in UTF-8, with or without a byte order mark. Raises `error` naming the line of a byte that is not."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode()
    except UnicodeDecodeError as found:
        line = data.count(b"\n", 0, found.start) + 1
        what = f"byte 0x{data[found.start]:02X} in line {line} is not UTF-8"
        raise error(f"{path}: {what}; save the file as UTF-8, such as by: iconv -f latin1 -t utf-8") from None


def find_class(name: str, names: Sequence[str]) -> int | None:
    """Return the index in `names` of the class `name`, also by its VOC or COCO synonym (aeroplane, airplane); None if absent."""
    return next((names.index(known) for known in (name, _OTHER_NAME.get(name)) if known in names), None)


def index_of(name: str, names: Sequence[str], where: str, error: type[UserError] = UserError) -> int:
    """Return the index of a class other than background. Raises `error` naming `where` and the nearest class."""
    index = find_class(name, names)
    if not index:
        raise error(f"{where}: {name!r:.40} is not one of the {len(names) - 1} classes; the closest is {nearest(name, names)!r}")
    return index


def nearest(name: str, names: Sequence[str]) -> str:
    """Return the class other than background whose name is the most similar."""
    return difflib.get_close_matches(name, names[1:], n=1, cutoff=0.0)[0]


def class_map(names: Sequence[str], target: Sequence[str]) -> tuple[int, ...]:
    """Return the index in `target` of each class in `names`; 0, the background, for classes that `target` does not have."""
    return tuple(find_class(name, target) or 0 for name in names)


def palette(num_classes: int = 256) -> list[int]:
    """Return PASCAL VOC's colour map as a flat list of 3 * `num_classes` values: the index's bits spread over R, G and B."""
    colours = []
    for index in range(num_classes):
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= ((index >> (3 * bit + channel)) & 1) << (7 - bit)
        colours += rgb
    return colours


def require_same(names: Sequence[str], other: Sequence[str], where: str) -> None:
    """Raise UserError naming `where` when two class lists differ."""
    if tuple(names) != tuple(other):
        raise UserError(
            f"{where}: its classes are {len(other)} ({', '.join(other[:4])}, ...), not the config's {len(names)} "
            f"({', '.join(names[:4])}, ...); set `classes` to the list that it was made with"
        )
