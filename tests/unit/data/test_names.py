"""Names of images and the keys made of them."""

from __future__ import annotations

import os
import unicodedata
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from weakclip.data.index import KEY, Entry, ShardError
from weakclip.data.names import composed, key_of, names_a_file, printable

FILE_NAMES = st.binary(min_size=1, max_size=240).map(os.fsdecode).filter(lambda name: not {"/", "\0"} & {*name})
NAMES = st.lists(FILE_NAMES, min_size=1, max_size=3).map("/".join).filter(names_a_file)


@pytest.mark.parametrize("name", ["2007_000032", "COCO_train2014_000000000009", "beach (1)", "~a-b", "x" * 80])
def test_a_plain_name_is_its_own_key(name):
    assert key_of(name) == name


@pytest.mark.parametrize(
    "name, key",
    [("my.photo.1", "my%2Ephoto%2E1"), ("Fähre", "F%C3%A4hre"), ("trip/a", "trip%2Fa"), ("50%", "50%25"), ("a\nb", "a%0Ab")],
)
def test_other_bytes_are_escaped(name, key):
    assert key_of(name) == key and key_of(unicodedata.normalize("NFD", name)) == key


@settings(max_examples=300)
@given(NAMES)
def test_a_key_names_a_tar_member_and_can_be_undone(name):
    key = key_of(name)
    assert KEY.fullmatch(key)
    if "~" not in key:
        assert os.fsdecode(unquote_to_bytes(key)) == composed(name)


@settings(max_examples=300)
@given(NAMES, NAMES)
def test_different_names_have_different_keys(one, other):
    assume(composed(one) != composed(other))
    assert key_of(one) != key_of(other)


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../a", "a/../b", "a//b", "./a", "a/", "a\0b", "a/./b", "\ud800x"])
def test_a_name_that_leaves_its_folder_is_refused(name):
    assert not names_a_file(name)
    with pytest.raises(ShardError, match=r"is not \[key, offset, length\] or"):
        Entry.parse("s.tar", ["x", 0, 512, name], "index.json")


def test_a_row_with_the_name_of_another_key_is_refused():
    row = [key_of("a.b"), 0, 512, "a.b"]
    assert Entry.parse("s.tar", row, "index.json").name == "a.b" and Entry.parse("s.tar", row, "").as_row() == row
    with pytest.raises(ShardError, match="is not"):
        Entry.parse("s.tar", ["other", 0, 512, "a.b"], "index.json")


def test_a_name_in_a_message_is_one_printable_line():
    assert printable("Fähre 1\n\x1b[2K\udcff.jpg") == r"Fähre 1\n\x1b[2K\udcff.jpg"


def test_odd_dots_are_names():
    for name in (".", "..", "...", "a/.", "a/.."):
        assert names_a_file(name) and KEY.fullmatch(key_of(name))
