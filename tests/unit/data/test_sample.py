"""The shard format through its public functions: round trips, refused input, and damage of any kind."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from weakclip.data.index import Entry, Index, ShardError, sha256
from weakclip.data.reading import parse_group, read_entry
from weakclip.data.sample import Cam, DecodedSample, PackedSample, Sample, decode_sample
from weakclip.datasets.writing import build_shards

NAMES = ("background", "cat", "dog", "cow")
K = len(NAMES)
H, W = 24, 32


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(array: np.ndarray) -> bytes:
    return encoded(Image.fromarray(array), "PNG")


def sample(number: int = 0, **changes) -> Sample:
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (H, W, 3), np.uint8)
    good = Sample(
        name=f"image_{number}",
        image=encoded(Image.fromarray(pixels), "JPEG"),
        image_ext="jpg",
        classes=(1, 3),
        height=H,
        width=W,
        source="made up",
        cam=Cam((1, 3), rng.integers(0, 256, (2, H // 4, W // 4), np.uint8), 0.25),
        seed=png(rng.choice(np.array([0, 1, 3, 255], np.uint8), (H, W))),
        mask=png(rng.integers(0, K, (H, W), np.uint8)),
    )
    return replace(good, **changes)


def decoded(one: Sample) -> DecodedSample:
    return decode_sample(one.encode(), Entry("shard-00000.tar", one.key, 0, 1), K)


def built(out: Path, count: int = 5, per_shard: int = 2) -> Index:
    return build_shards(range(count), sample, out, NAMES, samples_per_shard=per_shard)


def read(index: Index, entry: Entry) -> DecodedSample:
    return decode_sample(read_entry(index, entry), entry, len(index.classes))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Index:
    return built(tmp_path_factory.mktemp("shards") / "set")


# ------------------------------------------------------------------------------------------------ writing and reading


def test_a_set_gives_back_what_went_in(shards):
    index = Index.load(shards.root)
    assert index == shards == Index.load(shards.root / "index.json")
    assert index.classes == NAMES
    assert [len(shard.samples) for shard in index.shards] == [2, 2, 1]
    assert [entry.key for entry in index.entries] == [f"image_{n}" for n in range(5)]
    for number, entry in enumerate(index.entries):
        want, parts, got = sample(number), read_entry(index, entry), read(index, entry)
        assert parts["jpg"] == want.image
        assert json.loads(parts["json"])["source"] == "made up"
        np.testing.assert_array_equal(got.image, np.asarray(Image.open(io.BytesIO(want.image))))
        assert (got.name, got.classes, got.cam.classes, got.cam.scale) == (want.key, (1, 3), (1, 3), 0.25)
        np.testing.assert_array_equal(got.cam.maps_nhw, want.cam.maps_nhw)
        np.testing.assert_array_equal(got.seed, np.asarray(Image.open(io.BytesIO(want.seed))))
        np.testing.assert_array_equal(got.mask, np.asarray(Image.open(io.BytesIO(want.mask))))


def test_the_shards_are_plain_tar_files_that_webdataset_reads(shards):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(shards.root / shard.name) for shard in shards.shards]
    keys = [item["__key__"] for item in webdataset.WebDataset(urls, shardshuffle=False)]
    assert keys == [f"image_{n}" for n in range(5)]
    for shard in shards.shards:
        assert sha256(shards.root / shard.name) == shard.sha256
        with tarfile.open(shards.root / shard.name) as archive:
            assert {(m.mtime, m.uid, m.uname) for m in archive} == {(0, 0, "root")}


def test_the_same_samples_give_the_same_bytes(shards, tmp_path):
    again = built(tmp_path / "again")
    assert again.shards == shards.shards
    assert (again.root / "index.json").read_bytes() == (shards.root / "index.json").read_bytes()


def test_a_sample_may_have_the_image_alone(tmp_path):
    index = build_shards([0], lambda n: sample(n, cam=None, seed=None, mask=None, classes=()), tmp_path / "set", NAMES)
    got = read(index, index.entries[0])
    assert (got.classes, got.cam, got.seed, got.mask) == ((), None, None, None)


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_nothing_is_built_over_other_files(tmp_path, make):
    make(tmp_path / "set")
    if (tmp_path / "set").is_dir():
        (tmp_path / "set/shard-00000.tar").touch()
    with pytest.raises(ShardError, match="set: already holds files; remove it, or choose another directory"):
        built(tmp_path / "set")
    assert not (tmp_path / "set.partial").exists()


def test_an_empty_directory_is_used(tmp_path):
    (tmp_path / "set").mkdir()
    assert len(Index.load(built(tmp_path / "set").root).entries) == 5


def test_a_killed_build_leaves_no_set_and_says_what_to_do(tmp_path):
    (tmp_path / "set.partial").mkdir()
    with pytest.raises(ShardError, match="set.partial: a build is running, or one was killed; .* remove"):
        built(tmp_path / "set")
    assert (tmp_path / "set.partial").is_dir()


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    def load(number: int) -> Sample:
        return sample(number, classes=(1, K)) if number == 3 else sample(number)

    with pytest.raises(ShardError, match="made up: image_3: classes .* within 1..3"):
        build_shards(range(5), load, tmp_path / "set", NAMES, samples_per_shard=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a\\b", "a\nb", "café", "x" * 81])
def test_a_key_that_tar_or_webdataset_would_change_is_refused(tmp_path, key):
    with pytest.raises(ShardError, match="a key is"):
        build_shards([key], lambda key: PackedSample(key, sample().encode(), "made up"), tmp_path / "set", NAMES)


def test_two_samples_of_one_key_are_refused(tmp_path):
    with pytest.raises(ShardError, match="'image_7' is listed twice"):
        build_shards([1, 2, 3], lambda n: sample(n, name="image_7"), tmp_path / "set", NAMES, samples_per_shard=1)
    assert not (tmp_path / "set").exists()


def test_no_images_and_no_processes_are_refused(tmp_path):
    with pytest.raises(ShardError, match="no images"):
        built(tmp_path / "set", count=0)
    with pytest.raises(ValueError, match="at least 1"):
        build_shards([0], sample, tmp_path / "set", NAMES, processes=0)


# ------------------------------------------------------------------------------------------------------- the images

RED = (200, 30, 40)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (33, 17)])
def test_images_of_any_size(size):
    data = encoded(Image.new("RGB", size, RED), "PNG")
    one = sample(image=data, image_ext="png", height=size[1], width=size[0], cam=None, seed=None, mask=None)
    got = decoded(one).image
    assert got.shape == (size[1], size[0], 3) and got.dtype == np.uint8 and got.flags.writeable
    assert (got == RED).all()


def test_a_cam_of_a_one_pixel_image():
    data = encoded(Image.new("RGB", (1, 1)), "PNG")
    cam = Cam((1,), np.full((1, 1, 1), 9, np.uint8), 1.0)
    one = sample(image=data, image_ext="png", height=1, width=1, cam=cam, seed=None, mask=None)
    assert decoded(one).cam.classes == (1,)


def grey_16_bit() -> bytes:
    return png(np.full((H, W), 0x8012, np.uint16))


def grey_with_transparency() -> bytes:
    return encoded(Image.new("LA", (W, H), (0, 0)), "PNG")


def colour_half_transparent() -> bytes:
    return encoded(Image.new("RGBA", (W, H), (255, 0, 0, 128)), "PNG")


def palette_image() -> bytes:
    return encoded(Image.new("RGB", (W, H), RED).quantize(4), "PNG")


@pytest.mark.parametrize(
    "make, extension, want, tolerance",
    [
        (lambda: encoded(Image.new("L", (W, H), 90), "JPEG"), "jpg", (90, 90, 90), 1),
        (lambda: encoded(Image.new("CMYK", (W, H), (0, 255, 255, 0)), "JPEG", quality=95), "jpg", (255, 0, 0), 3),
        (lambda: encoded(Image.new("1", (W, H), 1), "PNG"), "png", (255, 255, 255), 0),
        (palette_image, "png", RED, 0),
        (grey_16_bit, "png", (128, 128, 128), 0),
        (grey_with_transparency, "png", (255, 255, 255), 0),
        (colour_half_transparent, "png", (255, 127, 127), 1),
    ],
    ids=["grey", "CMYK", "bilevel", "palette", "16 bit", "transparent", "half transparent"],
)
def test_every_kind_of_image_becomes_rgb(make, extension, want, tolerance):
    got = decoded(sample(image=make(), image_ext=extension)).image
    assert got.shape == (H, W, 3)
    assert np.abs(got.astype(int) - want).max() <= tolerance


def test_exif_rotation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    data = encoded(Image.new("RGB", (W, H)), "JPEG", exif=exif)
    assert decoded(sample(image=data)).image.shape == (H, W, 3)


def test_a_palette_mask_keeps_its_indices():
    mask = Image.fromarray(np.full((H, W), 3, np.uint8))
    mask.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    assert (decoded(sample(mask=encoded(mask, "PNG"))).mask == 3).all()


# -------------------------------------------------------------------------------------------------------- what is bad

JPEG = sample().image
CAM = sample().cam
WRONG_VALUE = png(np.full((H, W), K, np.uint8))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image": JPEG[: len(JPEG) // 2]}, "jpg cannot be decoded .*[Tt]runcated"),
        ({"image": JPEG[:2] + b"\0" * 50}, "jpg cannot be decoded"),
        ({"image": b""}, "jpg cannot be decoded"),
        ({"image": png(np.zeros((H, W), np.uint8))}, "jpg cannot be decoded"),
        ({"image_ext": "gif"}, "unknown part 'gif'"),
        ({"height": H + 1}, "jpg is 24 x 32, not 25 x 32"),
        ({"height": "24"}, "'height' is missing or not of type int"),
        ({"classes": (0, 1, 3)}, "within 1..3"),
        ({"classes": (1, 3, K)}, "within 1..3"),
        ({"classes": (3, 1)}, "ascending"),
        ({"classes": (1, 1, 3)}, "ascending"),
        ({"classes": (1,)}, r"CAM of class 3, which is not among the image's labels \[1\]"),
        ({"cam": replace(CAM, classes=(1,))}, "1,.* classes for maps of shape"),
        ({"cam": replace(CAM, maps_nhw=np.zeros((2, H, W), np.float32))}, "must hold classes int32, cam uint8"),
        ({"cam": replace(CAM, maps_nhw=CAM.maps_nhw.transpose(0, 2, 1))}, "does not fit an image"),
        ({"cam": replace(CAM, maps_nhw=np.zeros((2, H // 4 - 1, W // 4 - 1), np.uint8))}, "does not fit an image"),
        ({"cam": replace(CAM, scale=1.0)}, "does not fit an image"),
        ({"cam": replace(CAM, scale=float("nan"))}, "does not fit an image"),
        ({"seed": WRONG_VALUE}, "seed.png holds 4, which is neither 0..3 nor 255"),
        ({"mask": WRONG_VALUE}, "mask.png holds 4"),
        ({"seed": png(np.zeros((W, H), np.uint8))}, "seed.png is 32 x 24, not 24 x 32"),
        ({"seed": png(np.zeros((H, W, 3), np.uint8))}, "seed.png must be 8-bit grey or palette, is RGB"),
        ({"mask": JPEG}, "mask.png cannot be decoded"),
    ],
)
def test_a_bad_sample_is_named_with_its_shard(changes, message):
    with pytest.raises(ShardError, match=rf"^shard-00000.tar: image_0: .*{message}.*verify.py"):
        decoded(sample(**changes))


def test_grey_masks_of_four_bits_are_refused():
    """Pillow reads their indices 0, 1, 2, ... as 0, 17, 34, ..., and 17 is a class in most sets."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", W, H, 4, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(W // 2)) * H)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert Image.open(io.BytesIO(data)).mode == "L"
    with pytest.raises(ShardError, match="seed.png must be 8-bit grey or palette"):
        decoded(sample(seed=data))


@pytest.mark.parametrize("drop", ["jpg", "json"])
def test_a_sample_without_image_or_json_is_refused(drop):
    parts = {ext: data for ext, data in sample().encode().items() if ext != drop}
    with pytest.raises(ShardError, match="needs one image and one json"):
        decode_sample(parts, Entry("s.tar", "image_0", 0, 1), K)


def test_a_json_of_another_key_is_refused():
    with pytest.raises(ShardError, match="other: its json is that of 'image_0'"):
        decode_sample(sample().encode(), Entry("s.tar", "other", 0, 1), K)


def test_a_pickle_in_a_cam_is_not_loaded():
    buffer = io.BytesIO()
    np.savez(buffer, classes=np.array([1], object), cam=CAM.maps_nhw, scale=np.float32(1))
    with pytest.raises(ShardError, match="cam.npz cannot be read"):
        Cam.decode(buffer.getvalue())


@given(height=st.integers(1, 700), width=st.integers(1, 700), stride=st.sampled_from([1, 2, 4]), up=st.booleans())
def test_cams_at_a_stride_fit_their_image(height, width, stride, up):
    h, w = (-(-side // stride) if up or side < stride or stride == 4 else side // stride for side in (height, width))
    for scale in (h / height, w / width):
        assert Cam((1,), np.zeros((1, h, w), np.uint8), scale).fits(height, width)


# -------------------------------------------------------------------------------------------------- the index on disk


def edited(shards: Index, tmp_path: Path, edit) -> Path:
    root = tmp_path / "copy"
    shutil.copytree(shards.root, root)
    raw = json.loads((root / "index.json").read_bytes())
    raw = edit(raw) or raw
    (root / "index.json").write_text(json.dumps(raw))
    return root


def put(value, *path):
    def edit(raw):
        for step in path[:-1]:
            raw = raw[step]
        raw[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    "edit, message",
    [
        (put(2, "format"), "not a shard index of format 1"),
        (lambda raw: [raw], "not a shard index"),
        (put(None, "classes"), "'classes' is missing"),
        (put(["background", "cat", "cat"], "classes"), "different names"),
        (put([["background"], "cat"], "classes"), "different names"),
        (put({}, "shards"), "'shards' is missing"),
        (put("../index.tar", "shards", 0, "name"), "not a shard's name"),
        (put("x", "shards", 0, "sha256"), "not a SHA-256"),
        (put(True, "shards", 0, "bytes"), "'bytes' is missing or not of type int"),
        (put("image_1", "shards", 0, "samples", 0, 0), "key 'image_1' is listed twice"),
        (put("shard-00001.tar", "shards", 0, "name"), "'shard-00001.tar' is listed twice"),
        (put("a/b", "shards", 0, "samples", 0, 0), "is not .key, offset, length."),
        (put([1, 2], "shards", 0, "samples", 0), "is not .key, offset, length."),
        (put(-512, "shards", 0, "samples", 0, 1), "do not fit"),
        (put(0.0, "shards", 0, "samples", 0, 1), "do not fit"),
        (put(0, "shards", 0, "samples", 1, 1), "do not fit"),
        (put(0, "shards", 0, "samples", 0, 2), "do not fit"),
        (put(10**9, "shards", 0, "samples", 1, 2), "do not fit"),
    ],
)
def test_a_wrong_index_is_refused(shards, tmp_path, edit, message):
    with pytest.raises(ShardError, match=message) as error:
        Index.load(edited(shards, tmp_path, edit))
    assert "index.json" in str(error.value) and "\n" not in str(error.value)


def test_missing_and_truncated_shards_are_named(shards, tmp_path):
    root = edited(shards, tmp_path, lambda raw: None)
    file = root / "shard-00001.tar"
    file.write_bytes(file.read_bytes()[:-512])
    with pytest.raises(ShardError, match="shard-00001.tar: shard is .* bytes long, not .*; copy it again"):
        Index.load(root)
    file.unlink()
    with pytest.raises(ShardError, match="shard-00001.tar: shard is missing; copy it again"):
        Index.load(root)
    with pytest.raises(ShardError, match="index.json: no such file; .*build.py"):
        Index.load(tmp_path)


def test_reading_a_shard_that_shrank_or_went_is_an_error(shards, tmp_path):
    index = Index.load(edited(shards, tmp_path, lambda raw: None))
    entry = index.entries[1]
    file = index.root / entry.shard
    file.write_bytes(file.read_bytes()[: entry.offset + 700])
    with pytest.raises(ShardError, match="shard-00000.tar: image_1: 700 bytes, but the index has"):
        read_entry(index, entry)
    file.unlink()
    with pytest.raises(ShardError, match="shard-00000.tar: image_1: cannot be read"):
        read_entry(index, entry)


def test_a_range_of_another_sample_is_refused(shards):
    first, second = shards.entries[:2]
    with pytest.raises(ShardError, match="image_1: unexpected member 'image_0.cam.npz'"):
        read_entry(shards, replace(first, key="image_1"))
    with pytest.raises(ShardError, match="image_0: unexpected member 'image_1"):
        read_entry(shards, replace(first, length=first.length + second.length))


def by_tarfile(data: bytes, entry: Entry) -> dict[str, bytes]:
    """The members of a byte range that is all one sample's. Raises ValueError for anything else."""
    with tarfile.open(fileobj=io.BytesIO(data + bytes(1024)), mode="r:") as archive:
        members = archive.getmembers()
        named = {member.name.partition(".")[2]: archive.extractfile(member).read() for member in members if member.isreg()}
        ends = [member.offset_data + -(-member.size // 512) * 512 for member in members]
        if {member.name.partition(".")[0] for member in members} != {entry.key} or ends[-1] != len(data):
            raise ValueError
        if len(named) < len(members) or [member.offset for member in members] != [0, *ends[:-1]]:
            raise ValueError
    return named


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(0, 3), st.booleans())
def test_members_are_those_that_tarfile_finds_in_damaged_headers_too(shards, draws, member, mended):
    entry = shards.entries[0]
    data = bytearray((shards.root / entry.shard).read_bytes()[entry.offset : entry.offset + entry.length])
    whole, at = by_tarfile(data, entry), 0
    for body in [*whole.values()][:member]:
        at += 512 + -(-len(body) // 512) * 512
    # tarfile also refuses odd times and owners, which do not matter where the checksum is valid.
    places = [*range(100), *range(124, 136), 156, *range(345, 500)] if mended else [*range(512)]
    for place, value in draws.draw(st.lists(st.tuples(st.sampled_from(places), st.integers(0, 255)), max_size=3)):
        data[at + place] = value
    if mended:  # the checksum
        data[at + 148 : at + 156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    try:
        found = parse_group(bytes(data), entry)
    except ShardError:
        return
    assert found == by_tarfile(data, entry)


# ------------------------------------------------------------------------------------------------------------- damage


@st.composite
def damages(draw):
    """A function that flips some bytes, or cuts the end off, or inserts bytes."""
    kind = draw(st.sampled_from(["flip", "cut", "insert"]))
    places = draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4))
    values = draw(st.binary(min_size=4, max_size=4))

    def damage(data: bytes) -> bytes:
        changed = bytearray(data)
        if kind == "cut":
            return data[: int(places[0] * len(data))]
        for place, value in zip(places, values, strict=False):
            at = int(place * len(changed))
            changed[at : at + (kind == "flip")] = bytes([value])
        return bytes(changed)

    return damage


def assert_correct(got: DecodedSample) -> None:
    assert got.image.shape[2] == 3 and got.image.dtype == np.uint8
    size = got.image.shape[:2]
    assert all(1 <= c < K for c in got.classes)
    assert got.cam is None or (set(got.cam.classes) <= set(got.classes) and got.cam.fits(*size))
    for mask in (got.seed, got.mask):
        assert mask is None or (mask.shape == size and np.isin(mask, [*range(K), 255]).all())


@settings(max_examples=100, deadline=None)
@given(damage=damages())
def test_a_damaged_sample_is_an_error_or_still_correct(shards, damage):
    entry = shards.entries[0]
    data = damage((shards.root / entry.shard).read_bytes()[: entry.length])
    try:
        assert_correct(decode_sample(parse_group(data, replace(entry, length=len(data))), entry, K))
    except ShardError as error:
        assert str(error).startswith("shard-00000.tar: image_0: ")


@settings(max_examples=100, deadline=None)
@given(damage=damages(), part=st.sampled_from(sorted(sample().encode())))
def test_a_damaged_part_is_an_error_or_still_correct(damage, part):
    parts = sample().encode()
    parts[part] = damage(parts[part])
    try:
        assert_correct(decode_sample(parts, Entry("shard-00000.tar", "image_0", 0, 1), K))
    except ShardError as error:
        assert str(error).startswith("shard-00000.tar: image_0: ")


@settings(max_examples=100, deadline=None)
@given(damage=damages())
def test_a_damaged_index_is_an_error_or_still_consistent(shards, tmp_path_factory, damage):
    root = tmp_path_factory.getbasetemp() / "damaged_index"
    if not root.exists():
        shutil.copytree(shards.root, root)
    (root / "index.json").write_bytes(damage((shards.root / "index.json").read_bytes()))
    with suppress(ShardError):
        index = Index.load(root)
        for entry in index.entries:
            assert_correct(read(index, entry))


@settings(max_examples=40, deadline=None)
@given(value=st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["format", "classes", "shards", "name", "bytes", "sha256", "samples"]), inner, max_size=4),
    max_leaves=12,
))  # fmt: skip
def test_any_json_as_index_is_refused_or_empty(tmp_path_factory, value):
    root = tmp_path_factory.getbasetemp() / "any_json"
    root.mkdir(exist_ok=True)
    (root / "index.json").write_text(json.dumps({"format": 1, **value} if isinstance(value, dict) else value))
    with suppress(ShardError):
        assert Index.load(root).entries == ()
