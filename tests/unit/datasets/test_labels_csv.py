"""CSVs of image labels in the dialects that there are."""

from __future__ import annotations

import unicodedata

import pytest

from weakclip.data.index import ShardError
from weakclip.datasets.labels_csv import read_labels

NAMES = ("background", "cat", "dog", "fish, dried")


@pytest.fixture
def read(tmp_path):
    def labels(text: str | bytes, present=()) -> dict[str, set[int]]:
        (tmp_path / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_labels(tmp_path / "labels.csv", NAMES, present)

    return labels


@pytest.mark.parametrize(
    "text",
    [
        "file,labels\na.jpg,cat;dog\nb.jpg,\n",
        "labels,file\ncat;dog,a.jpg\n,b.jpg\n",
        "File, Labels\na.jpg, cat; dog\nb.jpg,\n",
        "FILENAME;Label\na.jpg;cat,dog\nb.jpg;\n",
        "image\tclasses\na.jpg\tcat|dog\nb.jpg\t\n",
        "path,file,labels,class,Label\nx,a.jpg,cat;dog,7,8\nx,b.jpg,,7,8\n",
        "file,labels,width\na.jpg,cat,7\na.jpg,dog,7\nb.jpg,,7\n",
        'file,cat,"fish, dried",dog\na.jpg,1,0,1\nb.jpg,0,0,0\n',
        "dog; file; cat;fish, dried\n 1;a.jpg;1;0\n0;b.jpg;0;0\n",
        "\ufefffile,labels\r\na.jpg,cat;dog\r\n\r\nb.jpg,\r\n",
        'file,labels\n"a.jpg","cat,dog"\nb.jpg,\n',
    ],
)
def test_dialects(read, text):
    assert read(text) == {"a.jpg": {1, 2}, "b.jpg": set()}


def test_a_class_with_a_comma_is_one_label(read):
    assert read('file;labels\na.jpg;"fish, dried"\n') == {"a.jpg": {3}}
    assert read("file,labels\na.jpg,cat;fish, dried\n".replace("fish, dried", '"fish, dried"').replace('cat;"', '"cat;')) == {
        "a.jpg": {1, 3}
    }


def test_file_names_are_found_as_they_are_and_in_either_normal_form(read):
    assert read('file,labels\n" a.jpg",cat\n', {" a.jpg"}) == {" a.jpg": {1}}
    assert read("file,labels\n a.jpg ,cat\n", {"a.jpg"}) == {"a.jpg": {1}}
    assert read("file,labels\n" + unicodedata.normalize("NFD", "ä.jpg,cat\n")) == {"ä.jpg": {1}}
    assert read('file,labels\n"a\nb.jpg",cat\n') == {"a\nb.jpg": {1}}


@pytest.mark.parametrize(
    "text, message",
    [
        ("file,cat,bird\na.jpg,1,0\n", "line 1: 'bird' is not one of the 3 classes; the closest is"),
        ('file,cat,dog,"fish, dried"\na.jpg,1,2,0\n', "line 2: column 'dog' must be 0 or 1, is '2'"),
        ('file,cat,dog,"fish, dried"\na.jpg,1,,0\n', "line 2: column 'dog' must be 0 or 1, is ''"),
        ('file,cat,dog,"fish, dried"\na.jpg,1\n', "line 2: must have one field per column"),
        ("file;labels\na.jpg;cat;dog\n", "line 2: must have one field per column"),
        ("image,path,labels\na.jpg,b.jpg,cat\n", "line 1 must be the header"),
        ("file,labels,cat,dog\na.jpg,,1,0\n", "line 1 has a column of labels and one for the class 'cat'; keep one kind"),
        ("file,cat,dog\na.jpg,1,0\n", "line 1: has no column for the class 'fish, dried'"),
        ('file,cat,dog,cat,"fish, dried"\na.jpg,1,0,0,0\n', "line 1: two columns are for the class 'cat'"),
        ("file,label,class\na.jpg,cat,dog\n", "line 1 must be the header"),
        ("file,background,cat\na.jpg,0,1\n", "'background' is not one of"),
        ("file,labels\na.jpg,cat/dog\n", "line 2: 'cat/dog' is not one of the 3 classes"),
        ("file,labels\na.jpg,\n".encode("utf-16"), "byte 0xFF in line 1 is not UTF-8"),
        (b"file,labels\n\xe4.jpg,cat\n", "labels.csv: byte 0xE4 in line 2 is not UTF-8; save the file as UTF-8"),
    ],
)
def test_what_is_ambiguous_is_refused(read, text, message):
    with pytest.raises(ShardError, match=message):
        read(text)
