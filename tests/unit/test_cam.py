"""The command that makes CAMs: one line for a user error, and its progress."""

from __future__ import annotations

import pytest

from weakclip import cam, cli


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, make_shards):
    """Three shards of labelled images without CAMs."""
    return make_shards(tmp_path_factory.mktemp("labelled") / "set", cam=None, seed=None)


@pytest.fixture
def fixed(labelled, tmp_path) -> list[str]:
    """Overrides of the tiny recipe by which CAMs are made in tmp_path/cams."""
    return [f"data.train={tmp_path}/cams", f"data.labelled={labelled.root}", "cam.prompts=['{}']", "cam.background_names=[boat]"]


@pytest.mark.parametrize(
    "more, message",
    [
        (["data.labelled=null"], "data.labelled is null; set it to the shard set with image labels that CAMs are made for"),
        (["data.labelled=nowhere"], "nowhere/index.json: no such file"),
        (["data.labelled=${data.train}"], "data.labelled and data.train must differ"),
        (["data.train=s3://bucket/set"], "data.train must be a directory: with data.labelled, the stage cam writes it"),
        (["classes=voc"], "its classes are 4 (background, cat, dog, cow, ...), not the config's 21"),
        (["cam.source=magic"], "cam.source must be one of clip, mctformer, is 'magic'"),
        (["cam.prompts=[a photo]"], "cam.prompts: 'a photo' must have exactly one {}, in place of the class name"),
        (["cam.prompts=['a {} in the fog']"], "this CLIP was not trained with a word of 'a cat in the fog'; change cam.prompts"),
        (["cam.background_names=[asphalt]"], "this CLIP was not trained with a word of 'asphalt'"),
        (["cam.synonyms={car: bus}"], "cam.synonyms: 'car' is not a class of the recipe"),
        (["cam.prompts=['boat boat boat boat boat boat boat boat boat boat boat boat boat boat {}']"], "reads at most 16 tokens"),
        (["cam.scales=[]"], "cam.scales must be positive numbers"),
        (["cam.box_threshold=1.2"], "cam.box_threshold must lie in 0..1"),
        (["--shards", "3:4"], "--shards 3:4:"),
    ],
)
def test_a_mistake_is_one_line(tiny_recipe, fixed, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit):
        cli.run(cam.main, ["--config", str(tiny_recipe), *fixed, *more])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not [*tmp_path.glob("cams*")]


def test_the_command_says_how_far_it_is(tiny_recipe, fixed, tmp_path, capsys):
    cam.main(["--config", str(tiny_recipe), "--shards", "0:2", *fixed])
    assert capsys.readouterr().out == f"{tmp_path}/cams: 2 of 3 shards with CAMs\n"
