"""The command that makes CAMs: one line for a user error, and its progress."""

from __future__ import annotations

import pytest
from PIL import Image

from weakclip import cam, cli, labels
from weakclip.cams.provenance import clip_es
from weakclip.launch import submit
from weakclip.recipe import load
from weakclip.stages import STAGES


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


@pytest.mark.parametrize("built", [True, False])
def test_the_clip_that_ships_is_refused_for_photos_before_anything_is_loaded(tiny_recipe, tmp_path, capsys, built):
    """By the command, and in the plan of a chain whose shards do not exist yet."""
    (tmp_path / "names.txt").write_text("background\ncat\nperson\n")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos/a.png")
    (tmp_path / "labels.csv").write_text("file,labels\na.png,person\n")
    photos = f"{{source: folder, images: {tmp_path}/photos, labels: {tmp_path}/labels.csv}}"
    options = [f"classes={tmp_path}/names.txt", f"data.labelled={tmp_path}/labelled", f"data.train={tmp_path}/cams"]
    options += ["clip.pretrained=demo", f"data.build={photos}", f"run={tmp_path}/run"]
    config = load(tiny_recipe, options)
    if built:
        STAGES["shards"].run(config, None)
    command = (cam.main, []) if built else (submit.main, ["--stage", "all", "--cluster", "local", "--dry-run"])
    with pytest.raises(SystemExit):
        cli.run(command[0], ["--config", str(tiny_recipe), *command[1], *options])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "error: clip.pretrained=demo: this CLIP knows the words of the demo's synthetic world only, not 'person'"
    )
    assert not [*tmp_path.glob("cams*"), *tmp_path.glob("run")]


def test_a_synonym_may_be_a_word_that_the_clip_that_ships_knows(tiny_config):
    synonyms = "cam.synonyms={" + ", ".join(f"{name}: cat" for name in labels.VOC[1:]) + "}"
    assert clip_es(tiny_config("classes=voc", "clip.pretrained=demo", synonyms))["cam"]["source"] == "clip"


def test_the_command_says_how_far_it_is(tiny_recipe, fixed, tmp_path, capsys):
    cam.main(["--config", str(tiny_recipe), "--shards", "0:2", *fixed])
    assert capsys.readouterr().out == f"{tmp_path}/cams: 2 of 3 shards with CAMs\n"
