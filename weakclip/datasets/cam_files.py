"""Class activation maps as published repositories save them: .npy and .npz files of maps by class.

Shapes: H W image pixels, h w cells of an activation map, n maps of one image.
"""

from __future__ import annotations

import math
import operator
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from weakclip.data.index import ShardError
from weakclip.data.sample import Cam
from weakclip.labels import COCO_ID_TO_CLASS

_STACKS = ("attn_highres", "highres", "high_res", "cam")  # names of the [n, h, w] array beside "keys", in order of preference


def read_cam(file: Path, size_HW: tuple[int, int], labels: Sequence[int], cam_keys: str = "foreground0") -> Cam:
    """Return the activation maps in a .npy or .npz file, for an image of size (H, W) with these class indices.

    The file holds {key: map [h, w]}, or {"keys": [n], NAME: maps [n, h, w]} with NAME "attn_highres", "highres",
    "high_res" or "cam"; `cam_keys` (one of weakclip.config.CAM_KEYS) says what the keys mean. Maps are float, or uint8 with
    255 = 1.0, and cover the whole image. Negative values become 0; a map whose maximum is above 1 is divided by it; maps
    smaller than a quarter of the image's sides are enlarged to a quarter.
    Raises ShardError naming the file when it is anything else, and when it has a map of a class not in `labels`.
    """
    maps: dict[int, Any] = {}
    for key, map_hw in _keyed_maps(read_dict(file), file):
        index = _class_index(key, cam_keys, file)
        if index == 0 and cam_keys == "class":
            continue  # a map of the background; seeds are made from the foreground's
        if index not in labels:
            raise ShardError(f"{file}: map of class {index} (key {key}), but the image's labels are {list(labels)}; "
                             f"is --cam-keys {cam_keys} wrong, or the file another image's?")  # fmt: skip
        if index in maps:
            raise ShardError(f"{file}: two maps of class {index}")
        maps[index] = map_hw
    return pack_cam(maps, size_HW, str(file))


def map_shape(file: Path) -> tuple[int, int]:
    """Return the size (h, w) of the first map in a file, (1, 1) where it has none. Raises ShardError as `read_cam`."""
    shapes = (map_hw.shape for _, map_hw in _keyed_maps(read_dict(file), file) if isinstance(map_hw, np.ndarray))
    return next((shape for shape in shapes if len(shape) == 2), (1, 1))


def quarter(size: tuple[int, int]) -> tuple[int, int]:
    """Return the sides (h, w) of a CAM for an image of this size (H, W): the smallest that a shard may have."""
    return -(-size[0] // 4), -(-size[1] // 4)


def pack_cam(maps: Mapping[int, Any], size_HW: tuple[int, int], where: str) -> Cam:
    """Return the maps [h, w] by class index as they are stored, for an image of size (H, W). See `read_cam` for the conversion.

    Raises ShardError naming `where` when there are none, or when they are not maps of one size.
    """
    packed = {index: _quantise(map_hw, size_HW, f"{where}: map of class {index}") for index, map_hw in maps.items()}
    if len({map_hw.shape for map_hw in packed.values()}) != 1:
        raise ShardError(f"{where}: holds no maps, or maps of different sizes")
    classes = tuple(sorted(packed))
    maps_nhw = np.stack([packed[index] for index in classes])
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
    """Return the (key, map) pairs from either of the two layouts."""
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
    """Return the map as uint8 h x w, 255 = 1.0, at a quarter of the image's sides or more."""
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

# The functions that numpy's own pickles call, under their names in numpy 1 and numpy 2.
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


def read_dict(file: Path) -> dict[Any, Any]:
    """Return the dict in a .npy file (pickled, as np.save writes it), or the named arrays of a .npz file.

    Raises ShardError naming the file when it is damaged, holds no dict, or holds anything but numpy arrays, numbers, text and
    containers.
    """
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
        raise ShardError(f"{file}: holds no dict, so the classes of its arrays are unknown; save a dict of maps by class")
    return value


def _read_npy(stream: BinaryIO) -> Any:
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if shape != () or not dtype.hasobject:
        return None
    array = _ArrayUnpickler(stream).load()
    return array.item() if isinstance(array, np.ndarray) else None
