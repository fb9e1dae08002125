"""Readers of what shards are built from: COCO instance annotations, and the CAMs and seeds of published repositories.

Shapes: H W image pixels, h w cells of an activation map, n maps of one image.
"""

from __future__ import annotations

import io
import json
import math
import operator
import pickle
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from weakclip.data.shard import Cam, Sample, ShardError
from weakclip.labels import COCO_ID_TO_CLASS, palette

CAM_KEYS = ("foreground0", "class", "coco")
"""What the keys in a CAM file mean: foreground classes from 0, class indices (0: background), or COCO category ids."""

_STACKS = ("attn_highres", "highres", "high_res", "cam")  # names of the [n, h, w] array beside "keys", the best first
_PNG = b"\x89PNG\r\n\x1a\n"


# --------------------------------------------------------------------------------------------------------------- COCO


@dataclass(frozen=True)
class CocoItem:
    """One image of a COCO split and where its parts lie. `segments`: (class, COCO segmentation) pairs, or None."""

    key: str
    image: Path
    height: int
    width: int
    classes: tuple[int, ...]
    cam: Path | None = None
    seed: Path | None = None
    segments: tuple[tuple[int, Any], ...] | None = None


def coco_items(
    images: str | Path, annotations: str | Path, cams: str | Path | None = None, with_masks: bool = False
) -> list[CocoItem]:
    """Every image of a COCO instances file, ordered by id; its classes are those annotated in it, crowds included.

    `cams` is a directory with KEY.npy, KEY.npz or KEY.png (a seed mask) for each image with labels.
    Raises ShardError when the annotations are not COCO's, when the files in `images` are not those they list, and when
    a CAM is missing.
    """
    images, annotations = Path(images), Path(annotations)
    listed, segments = _read_instances(annotations)
    _check_files(images, [image["file_name"] for image in listed], annotations)
    cam_names = {path.name for path in Path(cams).iterdir()} if cams else set()
    items = []
    for image in sorted(listed, key=operator.itemgetter("id")):
        key = Path(image["file_name"]).stem
        found = segments.get(image["id"], [])
        classes = tuple(sorted({index for index, _ in found}))
        cam, seed = _find_cam(Path(cams), cam_names, key) if cams and classes else (None, None)
        file, size_HW = images / image["file_name"], (image["height"], image["width"])
        items.append(CocoItem(key, file, *size_HW, classes, cam, seed, tuple(found) if with_masks else None))
    return items


def load_coco(item: CocoItem, cam_keys: str = "foreground0") -> Sample:
    """Read the files of one item. Raises ShardError or OSError naming the file that is at fault."""
    data = item.image.read_bytes()
    mask = None
    if item.segments is not None:
        picture = Image.fromarray(_rasterise(item.segments, item.height, item.width, item.key))
        picture.putpalette(palette())
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        mask = buffer.getvalue()
    return Sample(
        key=item.key,
        image=data,
        image_ext="png" if data.startswith(_PNG) else "jpg",
        classes=item.classes,
        height=item.height,
        width=item.width,
        source=f"{item.image.parent.name}/{item.image.name}",
        cam=read_cam(item.cam, (item.height, item.width), item.classes, cam_keys) if item.cam else None,
        seed=item.seed.read_bytes() if item.seed else None,
        mask=mask,
    )


def _read_instances(file: Path) -> tuple[list[dict[str, Any]], dict[int, list[tuple[int, Any]]]]:
    """The images of an instances file, and by image id its (class index, segmentation) pairs."""
    segments = defaultdict(list)
    try:
        raw = json.loads(file.read_bytes())
        images = [{name: image[name] for name in ("id", "file_name", "height", "width")} for image in raw["images"]]
        for annotation in raw["annotations"]:
            if (category := annotation["category_id"]) not in COCO_ID_TO_CLASS:
                raise ShardError(f"{file}: category_id {category!r} is not one of COCO's 80 things")
            segments[annotation["image_id"]].append((COCO_ID_TO_CLASS[category], annotation["segmentation"]))
        ids = {image["id"] for image in images}
    except ShardError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"{file}: not a COCO instances file ({type(error).__name__}: {error})") from None
    if len(ids) < len(images):
        raise ShardError(f"{file}: two images have the same id")
    if strangers := segments.keys() - ids:
        raise ShardError(f"{file}: annotations of image {min(strangers)}, which it does not list under 'images'")
    return images, segments


def _check_files(directory: Path, names: list[str], annotations: Path) -> None:
    """Raise ShardError unless the images in `directory` are exactly `names`."""
    present = {path.name for path in directory.iterdir() if path.suffix.lower() in {".jpg", ".jpeg", ".png"}}
    if missing := set(names) - present:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ShardError(f"{directory / min(missing)}: no such image{more}, but {annotations} lists it")
    if unlisted := present - set(names):
        more = f" (and {len(unlisted) - 1} more)" if len(unlisted) > 1 else ""
        raise ShardError(f"{directory / min(unlisted)}: {annotations} has no annotations for this image{more}")


def _find_cam(directory: Path, names: set[str], key: str) -> tuple[Path | None, Path | None]:
    """The files of maps and of the seed for `key`; at least one is there."""
    maps = [directory / f"{key}{suffix}" for suffix in (".npy", ".npz") if f"{key}{suffix}" in names]
    seed = directory / f"{key}.png" if f"{key}.png" in names else None
    if len(maps) > 1:
        raise ShardError(f"{maps[0]}: there is {maps[1].name} too; keep one of them")
    if not maps and not seed:
        raise ShardError(f"{directory / key}.npy: no such file, nor .npz or .png; make the CAM of this image first")
    return (maps[0] if maps else None), seed


# -------------------------------------------------------------------------------------------------------- COCO's masks


def _rasterise(segments: Iterable[tuple[int, Any]], height: int, width: int, key: str) -> np.ndarray:
    """Class mask, uint8 H x W. Where instances overlap the one with the fewest pixels wins."""
    try:
        masks = [(_segment_mask(segmentation, height, width), index) for index, segmentation in segments]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{key}: a segmentation is neither polygons nor RLE with list counts ({error})") from None
    mask_HW = np.zeros((height, width), np.uint8)
    for inside_HW, index in sorted(masks, key=lambda pair: -int(pair[0].sum())):
        mask_HW[inside_HW] = index
    return mask_HW


def _segment_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """bool H x W of one COCO segmentation: a list of polygons [x, y, x, y, ...] or {"counts": run lengths}."""
    if isinstance(segmentation, dict):
        runs = np.array(segmentation["counts"], np.int64)  # raises ValueError for the compressed form, a string
        values = np.arange(len(runs)) % 2 == 1
        return np.repeat(values, runs).reshape(width, height).T  # runs go down the columns
    inside_HW = np.zeros((height, width), bool)
    for polygon in segmentation:
        inside_HW |= _polygon_mask(np.array(polygon, np.float64).reshape(-1, 2), height, width)
    return inside_HW


def _polygon_mask(points_n2: np.ndarray, height: int, width: int) -> np.ndarray:
    """bool H x W: the pixels whose centre lies inside the polygon, by the even-odd rule."""
    x0, y0 = points_n2.T
    x1, y1 = np.roll(points_n2, -1, axis=0).T
    # Rows whose centre line an edge crosses are top .. bottom - 1.
    top = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), 0, height).astype(int)
    bottom = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), 0, height).astype(int)
    count = bottom - top
    edge = np.repeat(np.arange(len(points_n2)), count)
    row = np.arange(count.sum()) + np.repeat(top - (count.cumsum() - count), count)
    x = x0[edge] + (row + 0.5 - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(int)
    crossings_HW = np.zeros((height, width + 1), np.uint8)
    np.add.at(crossings_HW, (row, column), 1)
    return (crossings_HW.cumsum(axis=1, dtype=np.uint8)[:, :width] & 1).astype(bool)


# --------------------------------------------------------------------------------------------------------------- CAMs


def read_cam(file: Path, size_HW: tuple[int, int], labels: Sequence[int], cam_keys: str = "foreground0") -> Cam:
    """The activation maps in a .npy or .npz file, for an image of size (H, W) with these class indices.

    The file holds {key: map [h, w]}, or {"keys": [n], NAME: maps [n, h, w]} with NAME "attn_highres", "highres",
    "high_res" or "cam"; `cam_keys` (one of CAM_KEYS) says what the keys mean. Maps are float, or uint8 with 255 = 1.0,
    and cover the whole image. Negative values become 0; a map whose maximum is above 1 is divided by it; maps smaller
    than a quarter of the image's sides are enlarged to a quarter.
    Raises ShardError naming the file when it is anything else, and when it has a map of a class not in `labels`.
    """
    maps = {}
    for key, map_hw in _keyed_maps(_read_dict(file), file):
        index = _class_index(key, cam_keys, file)
        if index == 0 and cam_keys == "class":
            continue  # a map of the background; seeds are made from the foreground's
        if index not in labels:
            raise ShardError(f"{file}: map of class {index} (key {key}), but the image's labels are {list(labels)}; "
                             f"is --cam-keys {cam_keys} wrong, or the file another image's?")  # fmt: skip
        if index in maps:
            raise ShardError(f"{file}: two maps of class {index}")
        maps[index] = _quantise(map_hw, size_HW, f"{file}: map of class {index}")
    if len({map_hw.shape for map_hw in maps.values()}) != 1:
        raise ShardError(f"{file}: holds no maps, or maps of different sizes")
    classes = tuple(sorted(maps))
    maps_nhw = np.stack([maps[index] for index in classes])
    return Cam(classes, maps_nhw, max(maps_nhw.shape[1:]) / max(size_HW))


def _class_index(key: Any, cam_keys: str, file: Path) -> int:
    try:
        number = int(key) if isinstance(key, str) else operator.index(key)
        if cam_keys == "coco":
            return COCO_ID_TO_CLASS[number]
    except (TypeError, ValueError, KeyError):
        raise ShardError(f"{file}: {key!r:.40} is not a class key (--cam-keys {cam_keys})") from None
    return number + 1 if cam_keys == "foreground0" else number


def _keyed_maps(raw: dict[Any, Any], file: Path) -> list[tuple[Any, Any]]:
    """(key, map) pairs from either of the two layouts."""
    if "keys" not in raw:
        return list(raw.items())
    name = next((name for name in _STACKS if name in raw), None)
    if name is None:
        raise ShardError(f"{file}: has 'keys' but none of {', '.join(_STACKS)}")
    keys, maps = raw["keys"], raw[name]
    if not all(isinstance(v, (list, tuple)) or (isinstance(v, np.ndarray) and v.ndim) for v in (keys, maps)):
        raise ShardError(f"{file}: 'keys' and {name!r} must be arrays")
    if len(keys) != len(maps):
        raise ShardError(f"{file}: {len(keys)} keys for {len(maps)} maps in {name!r}")
    return list(zip(keys, maps, strict=True))


def _quantise(map_hw: Any, size_HW: tuple[int, int], where: str) -> np.ndarray:
    """uint8 map, 255 = 1.0, at a quarter of the image's sides or more."""
    if not isinstance(map_hw, np.ndarray) or map_hw.ndim != 2 or not map_hw.size:
        raise ShardError(f"{where}: is not an array [h, w]")
    if map_hw.dtype == np.uint8:
        map_hw = map_hw / np.float32(255)
    elif not np.issubdtype(map_hw.dtype, np.floating):
        raise ShardError(f"{where}: is {map_hw.dtype}; maps are float, or uint8 with 255 = 1.0")
    if not np.isfinite(map_hw).all():
        raise ShardError(f"{where}: holds NaN or infinity")
    map_hw = np.maximum(map_hw, 0)
    if map_hw.max() > 1 + 1e-6:
        map_hw = map_hw / map_hw.max()
    map_hw = map_hw.astype(np.float32)
    if any(4 * side < full for side, full in zip(map_hw.shape, size_HW, strict=True)):
        quarter_wh = math.ceil(size_HW[1] / 4), math.ceil(size_HW[0] / 4)
        map_hw = np.asarray(Image.fromarray(map_hw).resize(quarter_wh, Image.Resampling.BILINEAR))
    return np.rint(np.clip(map_hw, 0, 1) * 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------- files of arrays

# The functions numpy's own pickles call, under the names of numpy 1 and of numpy 2.
_RECONSTRUCT, _SCALAR = np.empty(0).__reduce__()[0], np.float32(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.multiarray", "scalar"): _SCALAR,
    ("numpy._core.multiarray", "scalar"): _SCALAR,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Loads numbers, text, containers and numpy arrays only: CAM files are downloads, and a pickle may run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise ShardError(f"refused to load {module}.{name} from a pickle; only numpy arrays are read, "
                             "so save the maps as numpy arrays (for torch, tensor.cpu().numpy())")  # fmt: skip
        return _ALLOWED[module, name]


def _read_dict(file: Path) -> dict[Any, Any]:
    """The dict in a .npy file (pickled, as np.save writes it), or the named arrays of a .npz file."""
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        with open(file, "rb") as stream:
            value = _read_npy(stream)
    except OSError:
        raise
    except ShardError as error:
        raise ShardError(f"{file}: {error}") from None
    except Exception as error:  # a reader of damaged or hostile bytes may raise anything
        raise ShardError(f"{file}: cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(value, dict):
        raise ShardError(f"{file}: holds no dict of maps, so nothing says which class a map is of")
    return value


def _read_npy(stream: BinaryIO) -> Any:
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if shape != () or not dtype.hasobject:
        return None
    array = _ArrayUnpickler(stream).load()
    return array.item() if isinstance(array, np.ndarray) else None
