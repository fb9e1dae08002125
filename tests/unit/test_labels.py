"""Class names, id maps, the palette and the tokens of the names."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from weakclip import labels
from weakclip.config import ConfigError
from weakclip.models.clip import tokenize


def test_coco_has_80_things_after_background_and_maps_every_id():
    assert len(labels.COCO) == 81 == len(set(labels.COCO)) and len(labels.VOC) == 21
    assert sorted(labels.COCO_ID_TO_CLASS.values()) == list(range(1, 81))
    assert labels.COCO_ID_TO_CLASS[1] == 1 and labels.COCO_ID_TO_CLASS[90] == 80
    assert set(range(1, 91)) - set(labels.COCO_ID_TO_CLASS) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    for raw, name in [(1, "person"), (13, "stop sign"), (44, "bottle"), (67, "dining table"), (90, "toothbrush")]:
        assert labels.COCO[labels.COCO_ID_TO_CLASS[raw]] == name


def test_the_names_become_the_tokens_of_the_released_code(golden_part):
    want = load_file(golden_part / "tokens.safetensors")
    assert tokenize(labels.VOC, 5).equal(want["voc"])
    raw_ids = [0, *labels.COCO_ID_TO_CLASS]  # has a row per annotation id, gaps included
    assert tokenize(labels.COCO, 5).equal(want["coco"][raw_ids])


def test_tokens_are_padded_with_zeros_and_underscores_are_spaces():
    ids_KL = tokenize(["cat", "traffic light", "traffic_light"], 7)
    assert ids_KL.shape == (3, 7) and ids_KL[1].equal(ids_KL[2])
    assert (ids_KL[:, 0] == 49406).all() and (ids_KL[0, 3:] == 0).all() and ids_KL[0, 2] == 49407


def test_a_name_that_does_not_fit_is_refused_and_never_cut():
    assert tokenize(["a very long name"], 6).shape == (1, 6)
    with pytest.raises(ConfigError, match="'a very long name' takes 6 tokens; set clip.name_tokens to 6 or more"):
        tokenize(["cat", "a very long name"], 5)


def test_class_names_come_from_a_set_or_a_file(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("background\n\n cat \ndog\n")
    assert labels.class_names("coco") == labels.COCO
    assert labels.class_names(str(file)) == ("background", "cat", "dog")


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "at least two class names"),
        ("cat\ndog", "the first of them 'background'"),
        ("background\ncat\ncat", "twice"),
        ("\n".join(["background", *map(str, range(255))]), "256 classes; an 8-bit mask holds at most 255"),
    ],
)
def test_an_unusable_class_file_says_why(tmp_path, text, message):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError, match=f"names.txt: .*{message}"):
        labels.class_names(str(tmp_path / "names.txt"))


def test_an_unknown_class_set_names_those_there_are():
    with pytest.raises(ValueError, match="classes: 'cocoa' is neither voc, coco, demo nor a text file"):
        labels.class_names("cocoa")


def test_all_of_vocs_classes_are_cocos_under_one_name_or_another():
    to_coco, to_voc = labels.class_map(labels.VOC, labels.COCO), labels.class_map(labels.COCO, labels.VOC)
    assert to_coco[0] == to_voc[0] == 0 and 0 not in to_coco[1:]
    assert [to_voc[index] for index in to_coco] == list(range(21))
    renamed = {name: labels.COCO[to] for name, to in zip(labels.VOC, to_coco, strict=True) if name != labels.COCO[to]}
    assert renamed == {
        "aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle", "pottedplant": "potted plant",
        "sofa": "couch", "tvmonitor": "tv",
    }  # fmt: skip


def test_a_name_that_is_there_comes_before_its_other_name():
    names = ("background", "couch", "sofa")
    assert [labels.find_class(name, names) for name in ("couch", "sofa", "tv")] == [1, 2, None]
    assert labels.find_class("couch", names[::2]) == 1


def test_the_palette_is_pascals():
    colours = labels.palette()
    assert len(colours) == 768
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    assert {index: tuple(colours[3 * index : 3 * index + 3]) for index in known} == known


def test_another_class_list_is_refused_naming_the_place():
    labels.require_same(labels.VOC, list(labels.VOC), "here")
    with pytest.raises(ValueError, match="some/shards: its classes are 81 .* not the config's 21 .*set `classes`"):
        labels.require_same(labels.VOC, labels.COCO, "some/shards")
    with pytest.raises(ValueError, match="here"):
        labels.require_same(("a", "b"), ("b", "a"), "here")
