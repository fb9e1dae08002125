"""Readers of published CAM files: every layout is read, and no code in a file is ever executed."""

from __future__ import annotations

import io
import pickle
import re
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weakclip.data.index import ShardError
from weakclip.datasets.cam_files import read_cam

H, W = 40, 60
MAP = np.linspace(0, 1, H * W, dtype=np.float32).reshape(H, W)


def saved(tmp_path: Path, value) -> Path:
    np.save(tmp_path / "key.npy", value, allow_pickle=True)
    return tmp_path / "key.npy"


STACK = np.stack([MAP, MAP / 2])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_dict_of_maps(tmp_path, dtype):
    cam = read_cam(saved(tmp_path, {14: (MAP / 2).astype(dtype), 2: MAP.astype(dtype)}), (H, W), (3, 15))
    assert (cam.classes, cam.scale, cam.maps_nhw.dtype) == ((3, 15), 1.0, np.uint8)
    np.testing.assert_allclose(cam.maps_nhw / 255, STACK, atol=0.0025)


@pytest.mark.parametrize("name", ["attn_highres", "highres", "high_res", "cam"])
@pytest.mark.parametrize("keys", [np.array([2, 14]), [2, 14], (np.int64(2), np.int64(14))])
def test_keys_beside_a_stack_of_maps(tmp_path, name, keys):
    cam = read_cam(saved(tmp_path, {"keys": keys, name: STACK}), (H, W), (3, 15))
    assert cam.classes == (3, 15)
    np.testing.assert_allclose(cam.maps_nhw / 255, STACK, atol=0.002)


def test_the_best_of_several_stacks_is_read(tmp_path):
    stacks = {"cam": MAP[None, ::4, ::4], "high_res": MAP[None], "attn_highres": 1 - MAP[None]}
    file = saved(tmp_path, {"keys": [2], **stacks})
    np.testing.assert_allclose(read_cam(file, (H, W), (3,)).maps_nhw[0] / 255, 1 - MAP, atol=0.002)


@pytest.mark.parametrize("arrays", [{"keys": np.array([2, 14]), "cam": STACK}, {"2": STACK[0], "14": STACK[1]}])
def test_npz_files(tmp_path, arrays):
    np.savez(tmp_path / "key.npz", **arrays)
    assert read_cam(tmp_path / "key.npz", (H, W), (3, 15)).classes == (3, 15)


def test_what_keys_mean_is_an_option(tmp_path):
    file = saved(tmp_path, {1: MAP, 13: MAP / 2})
    assert read_cam(file, (H, W), (2, 14)).classes == (2, 14)
    assert read_cam(file, (H, W), (1, 13), "class").classes == (1, 13)
    assert read_cam(file, (H, W), (1, 12), "coco").classes == (1, 12)  # id 12 is a gap, so 13 is the 12th thing


def test_a_background_map_is_left_out(tmp_path):
    assert read_cam(saved(tmp_path, {0: 1 - MAP, 5: MAP}), (H, W), (5,), "class").classes == (5,)


def test_values_are_brought_to_0_1(tmp_path):
    maps = {0: MAP * 8 - 4, 1: MAP * 0.5 - 0.1, 2: np.zeros((H, W), np.float32), 3: np.full((H, W), 51, np.uint8)}
    got = read_cam(saved(tmp_path, maps), (H, W), (1, 2, 3, 4)).maps_nhw / 255
    np.testing.assert_allclose(got[0], np.clip(MAP * 2 - 1, 0, 1), atol=0.002)  # clipped at 0, divided by its maximum 4
    np.testing.assert_allclose(got[1], np.clip(MAP * 0.5 - 0.1, 0, 1), atol=0.002)  # within 0..1: as it is
    assert (got[2] == 0).all() and np.allclose(got[3], 0.2)


@pytest.mark.parametrize("size, want", [((40, 60), (10, 15)), ((41, 61), (11, 16)), ((10, 15), (3, 4)), ((8, 12), (3, 4))])
def test_small_maps_are_enlarged_to_a_quarter(tmp_path, size, want):
    ramp = np.tile(np.linspace(0, 1, 4, dtype=np.float32), (3, 1))
    cam = read_cam(saved(tmp_path, {0: ramp}), size, (1,))
    assert cam.maps_nhw.shape[1:] == want and cam.fits(*size)
    assert (np.diff(cam.maps_nhw[0].astype(int), axis=1) >= 0).all()
    assert cam.maps_nhw[0, :, 0].max() == 0 and cam.maps_nhw[0, :, -1].min() == 255


def with_value(value: float) -> np.ndarray:
    changed = MAP.copy()
    changed[3, 5] = value
    return changed


@pytest.mark.parametrize(
    "value, message",
    [
        ({0: MAP}, r"map of class 1 \(key 0\), but the image's labels are \[3\]; .*--cam-keys"),
        ({2: with_value(np.nan)}, "map of class 3: holds NaN or infinity"),
        ({2: with_value(np.inf)}, "map of class 3: holds NaN or infinity"),
        ({2: MAP[0]}, "is not an array .h, w."),
        ({2: MAP[:0]}, "is not an array .h, w."),
        ({2: MAP.tolist()}, "is not an array .h, w."),
        ({2: (MAP * 9).astype(np.int32)}, "is int32"),
        ({2: np.full((H, W), None)}, "is object"),
        ({2: MAP, "2": MAP}, "two maps of class 3"),
        ({}, "holds no maps"),
        ({"dog": MAP}, "'dog' is not a class key"),
        ({2.5: MAP}, "2.5 is not a class key"),
        ({"keys": [2], "maps": MAP[None]}, "has 'keys' but none of attn_highres"),
        ({"keys": [2, 3], "cam": MAP[None]}, "2 keys for 1 maps in 'cam'"),
        ({"keys": 2, "cam": MAP}, "'keys' and 'cam' must be arrays"),
        ([MAP], "holds no dict"),
        (MAP, "holds no dict"),
    ],
)
def test_bad_cams_are_named(tmp_path, value, message):
    with pytest.raises(ShardError, match=f"key.npy: .*{message}"):
        read_cam(saved(tmp_path, np.array(value, object) if isinstance(value, dict) else value), (H, W), (3,))


def test_coco_keys_in_a_gap_are_refused(tmp_path):
    with pytest.raises(ShardError, match="12 is not a class key"):
        read_cam(saved(tmp_path, {12: MAP}), (H, W), (12,), "coco")


def test_maps_of_two_sizes_are_refused(tmp_path):
    with pytest.raises(ShardError, match="maps of different sizes"):
        read_cam(saved(tmp_path, {2: MAP, 3: MAP[::2, ::2]}), (H, W), (3, 4))


class Touch:
    """Unpickled by a plain pickle.load, this makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_malicious_pickle_runs_nothing(tmp_path):
    victim = tmp_path / "victim"
    file = saved(tmp_path, {0: Touch(victim)})
    with pytest.raises(ShardError, match=r"key.npy: refused to load \S+ from a pickle"):
        read_cam(file, (H, W), (1,))
    assert not victim.exists()
    np.load(file, allow_pickle=True)
    assert victim.exists(), "the pickle does what the test is about"


@pytest.mark.parametrize(
    "name", ["os system", "posix system", "builtins eval", "builtins getattr", "numpy load", "numpy ndarray.tofile",
             "numpy.core.multiarray fromfile", "torch._utils _rebuild_tensor_v2"],
)  # fmt: skip
def test_only_named_globals_are_loaded(tmp_path, name):
    module, attribute = name.split()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    text = b"".join(b"\x8c" + struct.pack("B", len(part)) + part.encode() for part in (module, attribute))
    (tmp_path / "key.npy").write_bytes(header.getvalue() + b"\x80\x04" + text + b"\x93.")
    with pytest.raises(ShardError, match=f"refused to load {module}.{attribute} .*tensor.cpu"):
        read_cam(tmp_path / "key.npy", (H, W), (1,))


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_files_of_numpy_1_and_2_are_read(tmp_path, module):
    array = np.empty((), object)
    array[()] = {np.int64(2): MAP}
    text = pickle.dumps(array, protocol=3)  # numpy 1 saves with this protocol; names are plain lines in it
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    text, exchanged = re.subn(rb"cnumpy\._?core\.multiarray\n", b"c" + module + b"\n", text)
    assert exchanged
    (tmp_path / "key.npy").write_bytes(header.getvalue() + text)
    assert read_cam(tmp_path / "key.npy", (H, W), (3,)).classes == (3,)


GOOD = io.BytesIO()
np.save(GOOD, {2: MAP[::4, ::4]}, allow_pickle=True)


@settings(max_examples=150, deadline=None)
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_cam_file_is_an_error_or_still_a_cam(tmp_path_factory, changes):
    data = bytearray(GOOD.getvalue())
    for place, value in changes:
        data[int(place**3 * len(data))] = value  # mostly in the first part, before the numbers of the map
    file = tmp_path_factory.getbasetemp() / "damaged.npy"
    file.write_bytes(data)
    with suppress(ShardError):
        cam = read_cam(file, (H, W), (3,))
        assert cam.classes == (3,) and cam.maps_nhw.dtype == np.uint8
