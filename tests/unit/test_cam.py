"""The stage that makes CAMs: what becomes of a labelled set, in one go, in parts, and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from weakclip import cam, cli
from weakclip.cams.texts import PromptedClip
from weakclip.config import ConfigError, CrfConfig, SeedConfig
from weakclip.data.index import Index
from weakclip.data.reading import read_entry
from weakclip.data.sample import Cam, Sample, decode_sample
from weakclip.data.stream import StoredSamples
from weakclip.datasets.writing import Build
from weakclip.masks.seeds import cam_maps, refined_seed
from weakclip.training.jobs import Refine

NAMES = ("background", "cat", "dog", "cow")
LABELS = [(1,), (1, 2), (), (2, 3), (1, 2, 3), (3,)]
SIZES = [2, 1, 3]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, png_of) -> Index:
    """Six images in shards of 2, 1 and 3, the third without a label; those with cats have an old CAM, all have a mask."""

    def load(number: int) -> Sample:
        H, W = 40 + 3 * number, 64
        image_HW3 = np.random.default_rng(number).integers(0, 256, (H, W, 3), np.uint8)
        old = Cam((1,), np.full((1, H, W), 9, np.uint8), 1.0) if 1 in LABELS[number] else None
        mask = png_of(np.full((H, W), 1, np.uint8))
        return Sample(f"image_{number}", png_of(image_HW3), "png", LABELS[number], H, W, "made up", old, mask=mask)

    index = Build(range(6), load, tmp_path_factory.mktemp("labelled") / "set", NAMES, SIZES).run()
    assert index is not None
    return index


@pytest.fixture
def config(tiny_config, labelled, tmp_path):
    """`config("key=value", ...)`: the tiny recipe with CAMs to be made in tmp_path/cams."""
    fixed = (f"data.train={tmp_path}/cams", f"cam.data={labelled.root}", "cam.prompts=['{}']", "cam.background_names=[boat]")
    return lambda *more: tiny_config(*fixed, *more)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_but_the_cams_stays_as_it_is(config, labelled, capsys):
    cam.run(config(), None)
    assert "| 6/6 [" in capsys.readouterr().err
    index = Index.load(config().data.train)
    assert index.classes == NAMES and [len(shard.samples) for shard in index.shards] == SIZES
    assert [entry.key for entry in index.entries] == [entry.key for entry in labelled.entries]
    for before, after, classes in zip(labelled.entries, index.entries, LABELS, strict=True):
        old, new = read_entry(labelled, before), read_entry(index, after)
        found = decode_sample(new, after, len(NAMES)).cam
        assert (found.classes if found else ()) == classes
        assert found is None or (found.maps_nhw.max((1, 2)) == 255).all()
        assert old.pop("cam.npz", b"") != new.pop("cam.npz", None)
        assert old == new


def test_parts_are_the_whole_byte_for_byte(config, tmp_path):
    cam.run(config(), None)
    parts = config(f"data.train={tmp_path}/parts")
    for part in ("2:3", "0:1", "1:2"):
        assert not Path(parts.data.train).exists()
        cam.run(parts, part)
    assert contents(tmp_path / "parts") == contents(tmp_path / "cams")
    cam.run(parts, "0:1")  # of a job that came late


def test_what_was_stopped_makes_only_what_is_missing(config, labelled, tmp_path, monkeypatch):
    cam.run(config(), "0:2")
    assert cam.written(config(), labelled) == 2
    made, make = [], PromptedClip.cam
    monkeypatch.setattr(
        PromptedClip, "cam", lambda self, sample, template: made.append(sample.key) or make(self, sample, template)
    )
    cam.run(config(), None)
    assert made == ["image_3", "image_4", "image_5"]
    assert cam.written(config(), labelled) == len(Index.load(tmp_path / "cams").shards) == 3


def test_images_without_a_label_are_named(config, capsys):
    cam.run(config(), "1:2")
    assert "warning: 1 images have no label, so no CAM: image_2\n" in capsys.readouterr().err
    cam.run(config(), "2:3")
    assert "warning" not in capsys.readouterr().err


def test_empty_maps_are_counted_by_class(labelled):
    def of_cats_alone(sample):
        maps_nhw = np.zeros((len(sample.classes), *sample.size), np.uint8)
        maps_nhw[[index == 1 for index in sample.classes]] = 7
        return Cam(sample.classes, maps_nhw, 1.0)

    load = cam.WithCam(labelled, of_cats_alone, SeedConfig())
    for entry in labelled.entries:
        load(entry)
    assert load.warnings()[1] == "warning: 6 maps are empty, nothing was found of the class: dog 3, cow 3"


def test_seeds_refined_by_a_crf_stand_beside_the_cams(config, labelled, tmp_path):
    options = ("seeds.crf={iterations: 2}", "seeds.background=0.2", "seeds.foreground=0.6")
    refined = config(*options)
    cam.run(refined, None)
    index = Index.load(refined.data.train)
    for sample in StoredSamples(index, index.entries, 0):
        if sample.classes:
            wanted = refined_seed(cam_maps(sample), sample.cam.classes, sample.image, 0.2, 0.6, CrfConfig(iterations=2))
            np.testing.assert_array_equal(sample.seed, wanted)
        else:
            assert sample.seed is None
    with pytest.raises(ConfigError, match="cams is of another cam"):
        cam.written(config(*options[:2], "seeds.foreground=0.5"), labelled)


def test_refined_seeds_need_the_stage_that_makes_them(tiny_config):
    with pytest.raises(ConfigError, match="^seeds.crf: the stage cam makes such seeds, but cam.data is null"):
        Refine(tiny_config("seeds.crf={iterations: 2}"))


@pytest.mark.parametrize("background", ["[boat, bus]", "[]"])
def test_the_least_sharp_prompt_is_taken_and_noted(config, labelled, tmp_path, background):
    several = config("cam.prompts=['{}', 'boat {}', 'sofa {} train']", f"cam.background_names={background}")
    clip, expected = PromptedClip(several, NAMES), {}
    samples = [*StoredSamples(labelled, labelled.entries, 0)]
    for template in several.cam.prompts:
        expected[template] = 0.0
        for sample in samples:
            if len(sample.classes) < 2:
                continue
            image_E = clip._embed_image(sample.image)
            texts = clip.texts[template]
            rest = [row for row in range(3) if row + 1 not in sample.classes]
            others = texts.background_ME if len(texts.background_ME) else texts.classes_FE[rest]
            logits = [float(clip.clip.logit_scale * text @ image_E) for text in [*texts.classes_FE, *others]]
            scores = np.exp(np.array(logits))
            total = sum(scores[index - 1] for index in sample.classes) + scores[3:].sum()
            shares = np.array([scores[index - 1] / total for index in sample.classes])
            expected[template] += ((shares - shares.mean()) ** 2).mean() / shares.mean()
    assert clip.sharpness(samples) == pytest.approx(expected, rel=1e-3)
    cam.run(several, "0:1")
    noted = json.loads((tmp_path / "cams.partial" / "build.json").read_text())
    assert noted["prompt"] == min(expected, key=expected.__getitem__)


def test_later_parts_take_the_prompt_of_the_first(config, tmp_path, monkeypatch):
    several = config("cam.prompts=['{}', 'boat {}']")
    monkeypatch.setattr(PromptedClip, "sharpness", lambda self, samples: {"{}": 1.0, "boat {}": 0.5})
    cam.run(several, "0:1")
    monkeypatch.setattr(PromptedClip, "sharpness", lambda self, samples: {"{}": 0.0, "boat {}": 0.5})
    cam.run(several, "1:3")
    assert json.loads((tmp_path / "cams" / "build.json").read_text())["prompt"] == "boat {}"


def test_synonyms_stand_for_names(config):
    plain, other = (PromptedClip(config(*more), NAMES).texts["{}"] for more in ((), ("cam.synonyms={cow: sheep}",)))
    assert plain.classes_FE[:2].equal(other.classes_FE[:2]) and not plain.classes_FE[2].equal(other.classes_FE[2])


@pytest.mark.parametrize(
    "more, message",
    [
        (["cam.data=null"], "cam.data is null: it names the shard set with labels that CAMs are made for"),
        (["cam.data=nowhere"], "nowhere/index.json: no such file"),
        (["cam.data=${data.train}"], "cam.data must be another set than data.train"),
        (["data.train=s3://bucket/set"], "data.train must be a directory, since the stage cam writes it"),
        (["classes=voc"], "its classes are 4 (background, cat, dog, cow, ...), not the config's 21"),
        (["cam.source=magic"], "cam.source must be clip"),
        (["cam.prompts=[a photo]"], "cam.prompts: 'a photo' must have one {}, where the name stands"),
        (["cam.prompts=['a {} in the fog']"], "this CLIP was not trained with a word of 'a cat in the fog'; change cam.prompts"),
        (["cam.background_names=[asphalt]"], "this CLIP was not trained with a word of 'asphalt'"),
        (["cam.synonyms={car: bus}"], "cam.synonyms: 'car' is no class of the recipe"),
        (["cam.prompts=['boat boat boat boat boat boat boat boat boat boat boat boat boat boat {}']"], "reads at most 16 tokens"),
        (["cam.scales=[]"], "cam.scales must be positive numbers"),
        (["cam.box_threshold=1.2"], "cam.box_threshold must lie in 0..1"),
        (["--shards", "3:4"], "--shards 3:4:"),
    ],
)
def test_a_mistake_is_one_line(config, tiny_recipe, labelled, tmp_path, capsys, more, message):
    fixed = [f"data.train={tmp_path}/cams", f"cam.data={labelled.root}", "cam.prompts=['{}']", "cam.background_names=[boat]"]
    with pytest.raises(SystemExit):
        cli.run(cam.main, ["--config", str(tiny_recipe), *fixed, *more])
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not [*tmp_path.glob("cams*")]


def test_sets_of_other_origin_or_options_are_left_alone(config, make_shards, tmp_path):
    cam.run(config(), "0:1")
    before = contents(tmp_path / "cams.partial")
    with pytest.raises(ValueError, match="data.train: .*cams.partial is of another cam .see build.json in it.; remove it"):
        cam.run(config("cam.flip=true"), "1:2")
    assert contents(tmp_path / "cams.partial") == before
    make_shards(tmp_path / "foreign")
    with pytest.raises(ValueError, match="foreign was not made by cam; remove it, or leave cam out"):
        cam.run(config(f"data.train={tmp_path}/foreign"), None)


def test_cams_of_other_weights_are_left_alone_wherever_these_lie(config, save_tiny_clip, tmp_path):
    cam.run(config(), "0:1")
    same = save_tiny_clip(tmp_path / "elsewhere")
    assert cam.written(config(f"clip.pretrained={same}"), None) == 1
    (same / "open_clip_model.safetensors").write_bytes(b"another")
    with pytest.raises(ConfigError, match="cams.partial is of another cam"):
        cam.written(config(f"clip.pretrained={same}"), None)
    assert cam.written(config(f"clip.pretrained={tmp_path}/nowhere"), None) == 1  # not here yet, or not any more


def test_the_command_says_how_far_it_is(config, tiny_recipe, labelled, tmp_path, capsys):
    fixed = [f"data.train={tmp_path}/cams", f"cam.data={labelled.root}", "cam.prompts=['{}']", "cam.background_names=[boat]"]
    cam.main(["--config", str(tiny_recipe), "--shards", "0:2", *fixed])
    assert capsys.readouterr().out == f"{tmp_path}/cams: 2 of 3 shards with CAMs\n"
