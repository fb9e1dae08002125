"""Tar shards of other tools: dialects of GNU tar and Python, any order of members, and errors that name the member."""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weakclip.data.index import Entry, ShardError
from weakclip.data.reading import read_entry
from weakclip.data.sample import Cam, Sample, decode_sample
from weakclip.datasets.foreign_tars import load_foreign, scan, tar_files, unpacked
from weakclip.datasets.reshard import reshard
from weakclip.datasets.writing import build_shards
from weakclip.runtime.errors import UserError

NAMES = ("background", "cat", "dog")
H, W = 12, 16
LONG = "x" * 80
read = partial(load_foreign, num_classes=len(NAMES))


@pytest.fixture(scope="module")
def samples(png_of) -> dict[str, dict[str, bytes]]:
    """Members of three samples by key, one of them with the longest name there is."""

    def sample(key: str, number: int) -> Sample:
        image = png_of(np.random.default_rng(number).integers(0, 256, (H, W, 3), np.uint8))
        cam = Cam((1,), np.full((1, H, W), 9, np.uint8), 1.0) if number else None
        return Sample(key, image, "png", (1,), H, W, "made up", cam, mask=png_of(np.zeros((H, W), np.uint8)))

    return {key: sample(key, number).encode() for number, key in enumerate(("b", "a", LONG))}


@pytest.fixture
def files(tmp_path, samples) -> Path:
    """The samples as files in a folder with a folder in it."""
    (tmp_path / "files/inner").mkdir(parents=True)
    for key, parts in samples.items():
        folder = tmp_path / "files" / ("inner" if key == "a" else "")
        for extension, data in parts.items():
            (folder / f"{key}.{extension}").write_bytes(data)
    return tmp_path / "files"


def members(samples: dict[str, dict[str, bytes]]) -> list[tuple[str, bytes]]:
    return [(f"{key}.{extension}", data) for key, parts in samples.items() for extension, data in parts.items()]


def write_tar(path: Path, content: list[tuple[str, bytes]], **options) -> Path:
    with tarfile.open(path, "w:", **options) as archive:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def found(tar: Path) -> dict[str, dict[str, bytes]]:
    return {sample.key: read(sample).parts for sample in scan(tar)}


# ------------------------------------------------------------------------------------------------------ right samples


@pytest.mark.parametrize("format", ["gnu", "oldgnu", "pax", "ustar", "v7"])
@pytest.mark.parametrize("sort", ["name", "inode", "none"])
def test_gnu_tars_of_every_format_and_order(tmp_path, files, samples, format, sort):
    """A whole folder: its members are ./, ./inner/, ./inner/a.png ... in the order of the file system or of the names."""
    subprocess.run(["tar", f"--format={format}", f"--sort={sort}", "-cf", tmp_path / "x.tar", "-C", files, "."], check=True)
    assert found(tmp_path / "x.tar") == samples


def test_names_that_need_a_long_header(tmp_path, files, samples):
    """Beyond 100 bytes a name goes into a header of its own (GNU, PAX) or is cut in two (ustar)."""
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    files.rename(deep / "files")
    for format in ("gnu", "pax", "ustar"):
        tar = tmp_path / f"{format}.tar"
        subprocess.run(["tar", f"--format={format}", "-cf", tar, "-C", tmp_path, deep.relative_to(tmp_path)], check=True)
        assert found(tar) == samples


def test_a_tar_that_gnu_tar_added_to_member_by_member(tmp_path, files, samples):
    tar = tmp_path / "x.tar"
    names = sorted(str(path.relative_to(files)) for path in files.rglob("*.*"))
    subprocess.run(["tar", "-cf", tar, "-C", files, "--no-recursion", "inner"], check=True)
    for name in sorted(names, key=lambda name: name[::-1]):
        subprocess.run(["tar", "-rf", tar, "-C", files, name], check=True)
    assert found(tar) == samples


def test_tars_joined_by_gnu_tar(tmp_path, files, samples):
    for name, part in (("x.tar", "inner"), ("y.tar", f"{LONG}.png")):
        subprocess.run(["tar", "-cf", tmp_path / name, "-C", files, part], check=True)
    subprocess.run(["tar", "-Af", tmp_path / "x.tar", tmp_path / "y.tar"], check=True)
    joined = found(tmp_path / "x.tar")
    assert joined["a"] == samples["a"] and joined[LONG]["png"] == samples[LONG]["png"] and len(joined) == 2


@settings(max_examples=60, deadline=None)
@given(data=st.data(), format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]))
def test_pythons_tars_of_every_format_and_order(tmp_path_factory, samples, data, format):
    order = data.draw(st.permutations(members(samples)))
    tar = write_tar(tmp_path_factory.getbasetemp() / "any_order.tar", order, format=format)
    assert found(tar) == samples
    first_seen = list(dict.fromkeys(name.partition(".")[0] for name, _ in order))
    assert [sample.key for sample in scan(tar)] == first_seen


def test_pax_headers_for_all_members_and_for_one(tmp_path, samples):
    tar = write_tar(tmp_path / "x.tar", members(samples), format=tarfile.PAX_FORMAT, pax_headers={"comment": "für alle"})
    assert found(tar) == samples
    with tarfile.open(tar, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members(samples):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(content), 1.5, "jörg"
            archive.addfile(info, io.BytesIO(content))
    assert found(tar) == samples


def test_an_empty_tar_has_no_samples(tmp_path):
    assert scan(write_tar(tmp_path / "x.tar", [])) == []
    subprocess.run(["tar", "-cf", tmp_path / "y.tar", "-T", "/dev/null"], check=True)
    assert scan(tmp_path / "y.tar") == []


def test_what_was_found_can_be_built_and_read_again(tmp_path, samples):
    tar = write_tar(tmp_path / "x.tar", members(samples)[::-1])
    index = build_shards(scan(tar), read, tmp_path / "set", NAMES, samples_per_shard=2)
    assert [entry.key for entry in index.entries] == [LONG, "a", "b"]
    assert {entry.key: read_entry(index, entry) for entry in index.entries} == samples


# -------------------------------------------------------------------------------------------------------- other tools


@pytest.mark.parametrize(
    "name, part",
    [("jpg", "jpg"), ("jpeg", "jpg"), ("JPG", "jpg"), ("JPEG", "jpg"), ("Jpeg", "jpg"), ("PNG", "png")]
    + [("webp", "webp"), ("WEBP", "webp")],
)
def test_images_go_by_any_suffix(tmp_path, name, part):
    (sample,) = scan(write_tar(tmp_path / "x.tar", [(f"a.{name}", b"...")]))
    assert sample.parts == {part}


def test_two_suffixes_of_one_image_are_named(tmp_path):
    tar = write_tar(tmp_path / "x.tar", [("a.jpg", b""), ("a.JPEG", b"")])
    with pytest.raises(ShardError, match=r"x.tar: two members are called a.jpg; keep one"):
        scan(tar)


IMG2DATASET = {
    "caption": "a dog",
    "url": "https://x/a.jpg",
    "key": "a",
    "status": "success",
    "width": W,
    "height": H,
    "exif": "{}",
}


@pytest.fixture
def img2dataset(tmp_path, jpeg_of) -> Path:
    """A folder as img2dataset writes it."""
    image = jpeg_of(np.zeros((H, W, 3), np.uint8))
    folder = tmp_path / "tars"
    folder.mkdir()
    parts = [("a.jpg", image), ("a.txt", b"a dog"), ("a.json", json.dumps(IMG2DATASET).encode())]
    write_tar(folder / "00000.tar", [*parts, ("b.jpg", image)])
    (folder / "00000.parquet").touch()
    (folder / "00000_stats.json").write_text("{}")
    return folder


@pytest.fixture
def names(tmp_path) -> str:
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    return str(tmp_path / "names.txt")


@pytest.fixture
def numbered(tmp_path, samples) -> Callable[[bytes], str]:
    """Writes a folder of one tar, of an image and its KEY.cls."""

    def write(text: bytes) -> str:
        (tmp_path / "tars").mkdir()
        write_tar(tmp_path / "tars/x.tar", [("a.png", samples["a"]["png"]), ("a.cls", text)])
        return str(tmp_path / "tars")

    return write


def test_captions_and_notes_of_img2dataset_are_left_out_and_counted(tmp_path, img2dataset, names, caplog):
    caplog.set_level("INFO")
    index = reshard(str(img2dataset), tmp_path / "set", 8, 1, names)
    for entry in index.entries:
        parts = read_entry(index, entry)
        about = {"id": entry.key, "height": H, "width": W, "classes": [], "source": "00000.tar"}
        assert parts.keys() == {"jpg", "json"} and json.loads(parts["json"]) == about
    assert [record.getMessage() for record in caplog.records if record.name.startswith("weakclip")] == [
        f"{img2dataset}: left out 1 txt, 1 json; made the json of 2 of 2 samples, 2 of them without labels"
    ]


@pytest.mark.parametrize("data", [b"[]", b"{", b'{"id": "a"}', b'{"classes": [1]}'])
def test_a_json_that_may_be_ours_is_not_left_out(tmp_path, samples, data):
    tar = write_tar(tmp_path / "x.tar", [("a.png", samples["a"]["png"]), ("a.json", data)])
    with pytest.raises(ShardError, match=r"x.tar: a: .*json"):
        build_shards(scan(tar), read, tmp_path / "set", NAMES)


@pytest.mark.parametrize(
    "cls, text, classes",
    [
        ("foreground0", b"0", [1]),
        ("foreground0", b"1\n", [2]),
        ("foreground0", b"1, 0", [1, 2]),
        ("class", b"1", [1]),
        ("class", b"2 1 2", [1, 2]),
        ("class", b"", []),
    ],
)
def test_labels_are_read_from_class_numbers(tmp_path, numbered, names, cls, text, classes):
    index = reshard(numbered(text), tmp_path / "set", 8, 1, names, cls=cls)
    assert json.loads(read_entry(index, index.entries[0])["json"])["classes"] == classes


@pytest.mark.parametrize(
    "cls, text, said",
    [
        (None, b"1", "a.cls: '1' may count with or without the background; say it by --cls foreground0 .* or class"),
        ("foreground0", b"2", r"a.cls: '2' is not made of class numbers 0..1 \(--cls foreground0\)"),
        ("class", b"0", r"a.cls: '0' is not made of class numbers 1..2 \(--cls class\)"),
        ("class", b"3", "a.cls: '3' is not made of class numbers 1..2"),
        ("class", b"cat", "a.cls: 'cat' is not made of class numbers"),
        ("class", b"-1", "a.cls: '-1' is not made of class numbers"),
        ("class", b"\xb2", "a.cls: .* is not made of class numbers"),
    ],
)
def test_other_and_ambiguous_class_numbers_are_refused(tmp_path, numbered, names, cls, text, said):
    with pytest.raises(ShardError, match=f"x.tar: {said}"):
        reshard(numbered(text), tmp_path / "set", 8, 1, names, cls=cls)
    assert {path.name for path in tmp_path.iterdir()} == {"tars", "names.txt"}


@pytest.mark.parametrize("data, said", [(b"", "is empty"), (b"GIF89a", "not a JPEG, PNG or WebP image")])
def test_what_is_no_image_is_named(tmp_path, data, said):
    tar = write_tar(tmp_path / "x.tar", [("a.jpg", data)])
    with pytest.raises(ShardError, match=rf"x.tar: a.jpg: {said}$"):
        build_shards(scan(tar), read, tmp_path / "set", NAMES)


def test_a_meaning_of_class_numbers_where_there_are_none_is_refused(tmp_path, img2dataset, names):
    with pytest.raises(UserError, match=r"--cls class: no sample in .* has a KEY.cls; leave --cls out"):
        reshard(str(img2dataset), tmp_path / "set", 8, 1, names, cls="class")
    index = reshard(str(img2dataset), tmp_path / "set", 8, 1, names)
    with pytest.raises(UserError, match=r"--cls class: .* has an index.json, .*; leave --cls out"):
        reshard(str(index.root), tmp_path / "again", 8, 1, cls="class")


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz"])
def test_gzipped_tars_are_read_and_nothing_is_left_of_their_copies(tmp_path, samples, img2dataset, names, name):
    plain = write_tar(tmp_path / "plain.tar", members({key: samples[key] for key in ("a", LONG)})).read_bytes()
    (img2dataset / "00000.tar").unlink()
    (img2dataset / name).write_bytes(gzip.compress(plain))
    write_tar(img2dataset / "y.tar", members({"b": samples["b"]}))
    index = reshard(str(img2dataset), tmp_path / "out/set", 8, 1, names)
    assert {entry.key: read_entry(index, entry) for entry in index.entries} == samples
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["set"]


def test_gzipped_tars_of_one_name_are_both_read(tmp_path, samples):
    for key, name in (("a", "x.tar.gz"), ("b", "x.tgz")):
        plain = write_tar(tmp_path / "plain", members({key: samples[key]})).read_bytes()
        (tmp_path / "tars").mkdir(exist_ok=True)
        (tmp_path / "tars" / name).write_bytes(gzip.compress(plain))
    assert len(reshard(str(tmp_path / "tars"), tmp_path / "set", 8, 1, "voc").entries) == 2


def test_a_damaged_gzip_file_is_named(tmp_path, samples):
    data = gzip.compress(write_tar(tmp_path / "plain.tar", members(samples)).read_bytes())
    tar = tmp_path / "x.tar.gz"
    for wrong in (data[:-100], data[:50], b"not gzip", data[:60] + bytes(byte ^ 255 for byte in data[60:70]) + data[70:]):
        tar.write_bytes(wrong)
        with pytest.raises(ShardError, match=r"x.tar.gz: not a complete gzip file"), unpacked([tar], tmp_path / "out"):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {"plain.tar", "x.tar.gz"}


# ------------------------------------------------------------------------------------------------------- named errors


def unfit(kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo("a.png")
    info.type, info.linkname = kind, "b.png"
    return info


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_members_that_are_no_plain_files_are_named(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w:") as archive:
        archive.addfile(unfit(kind))
    with pytest.raises(ShardError, match=r"x.tar: member 'a.png' is not a regular file"):
        scan(tmp_path / "x.tar")


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_sparse_members_are_named(tmp_path, format):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(1 << 20)
    subprocess.run(["tar", f"--format={format}", "-S", "-cf", tmp_path / "x.tar", "-C", tmp_path, "a.png"], check=True)
    with pytest.raises(ShardError, match=r"x.tar: member 'a.png' is not a regular file"):
        scan(tmp_path / "x.tar")


@pytest.mark.parametrize("name", ["._a.png", ".DS_Store", "README", "in/._a.png", "a.", "__MACOSX/x", "a\nb.png"])
def test_members_that_belong_to_no_sample_are_named(tmp_path, samples, name):
    tar = write_tar(tmp_path / "x.tar", [*members(samples), (name, b"")])
    with pytest.raises(ShardError, match=f"x.tar: member {re.escape(repr(name))} is not called KEY.PART .*COPYFILE_DISABLE"):
        scan(tar)


@pytest.mark.parametrize("again", ["a.json", "./a.json", "other/a.json"])
def test_a_member_that_is_there_twice_is_named(tmp_path, samples, again):
    tar = write_tar(tmp_path / "x.tar", [*members(samples), (again, b"")])
    with pytest.raises(ShardError, match=r"x.tar: two members are called a.json; keep one"):
        scan(tar)


@pytest.mark.parametrize(
    "missing, message",
    [
        ("a.png", "needs one image and one json, has cam.npz, json"),
        ("a.json", r"CAM of class 1, which is not among the image's labels \[\]"),
    ],
)
def test_missing_parts_are_named_when_written(tmp_path, samples, missing, message):
    tar = write_tar(tmp_path / "x.tar", [member for member in members(samples) if member[0] != missing])
    with pytest.raises(ShardError, match=f"x.tar: a: {message}"):
        build_shards(scan(tar), read, tmp_path / "set", NAMES)
    assert not (tmp_path / "set").exists()


def test_a_part_that_the_format_has_not_is_named_when_written(tmp_path, samples):
    tar = write_tar(tmp_path / "x.tar", [*members(samples), ("a.cls", b"1")])
    with pytest.raises(ShardError, match="x.tar: .*unknown part 'cls'"):
        build_shards(scan(tar), read, tmp_path / "set", NAMES)


def test_tars_joined_by_cat_are_refused(tmp_path, samples):
    """A reader stops at the first end mark, and would lose the second tar."""
    data = write_tar(tmp_path / "x.tar", members(samples)[:2]).read_bytes()
    (tmp_path / "x.tar").write_bytes(data + write_tar(tmp_path / "y.tar", members(samples)[2:]).read_bytes())
    with pytest.raises(ShardError, match=r"x.tar: .*another tar follows; .*tar -A"):
        scan(tmp_path / "x.tar")


def test_no_tar_at_all(tmp_path):
    with pytest.raises(ShardError, match="holds neither an index.json nor .tar files"):
        tar_files(tmp_path)
    (tmp_path / "x.tar").touch()
    assert tar_files(tmp_path) == [tmp_path / "x.tar"]
    with pytest.raises(ShardError, match="x.tar: not a complete tar file"):
        scan(tmp_path / "x.tar")
    (tmp_path / "y.tar.xz").touch()
    with pytest.raises(ShardError, match="y.tar.xz: is compressed, but not by gzip"):
        tar_files(tmp_path)


def test_a_negative_size_does_not_run_in_circles(tmp_path, samples):
    tar = write_tar(tmp_path / "x.tar", members(samples), format=tarfile.GNU_FORMAT)
    header = tarfile.TarInfo("c.png")
    header.size = -1024
    at = scan(tar)[1].members[0][1] - 512
    data = bytearray(tar.read_bytes())
    data[at : at + 512] = header.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(ShardError, match="x.tar: "):
        scan(tmp_path / "x.tar")


def test_a_tar_cut_off_anywhere_is_refused(tmp_path, samples):
    """Exactly between two members as well, where a reader of tars sees nothing wrong."""
    data = write_tar(tmp_path / "x.tar", members(samples), format=tarfile.PAX_FORMAT).read_bytes()
    last = max(start + size for sample in scan(tmp_path / "x.tar") for _, start, size in sample.members)
    for end in [*range(0, last, 256), last]:
        (tmp_path / "x.tar").write_bytes(data[:end])
        with pytest.raises(ShardError, match="x.tar: "):
            scan(tmp_path / "x.tar")


@settings(max_examples=100, deadline=None)
@given(
    places=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4),
    values=st.binary(min_size=4, max_size=4),
    headers=st.booleans(),
    format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_a_damaged_tar_is_an_error_or_still_samples(tmp_path_factory, samples, places, values, headers, format):
    """What is read is the format's: a damaged byte of an image is for decode_sample to find, or for no one."""
    tar = tmp_path_factory.getbasetemp() / "damaged.tar"
    data = bytearray(write_tar(tar, members(samples), format=format).read_bytes())
    starts = [start - 512 for sample in scan(tar) for _, start, _ in sample.members]
    for place, value in zip(places, values, strict=False):
        at = starts[int(place * len(starts))] + int(place * 7919) % 512 if headers else int(place * len(data))
        data[at] = value
    tar.write_bytes(data)
    with suppress(ShardError):
        for sample in scan(tar):
            parts = read(sample).parts
            got = decode_sample(parts, Entry(tar.name, sample.key, 0, 1), len(NAMES))
            assert got.image.shape == (H, W, 3) and json.loads(parts["json"])["id"] == sample.key


def test_a_key_that_our_tars_cannot_hold_is_kept_as_a_name(tmp_path, samples):
    tar = write_tar(tmp_path / "x.tar", [("Fähre 50%.png", samples["a"]["png"])])
    index = build_shards(scan(tar), read, tmp_path / "set", NAMES)
    assert [(entry.key, entry.name) for entry in index.entries] == [("F%C3%A4hre 50%25", "Fähre 50%")]
