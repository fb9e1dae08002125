"""Making CAMs for a labelled set: at once, in parts, and resumed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from weakclip.cams import make
from weakclip.cams.texts import PromptedClip
from weakclip.config import ConfigError, CrfConfig, SeedConfig
from weakclip.data.index import Index
from weakclip.data.reading import read_entry
from weakclip.data.sample import Cam, Sample, decode_sample
from weakclip.data.stream import StoredSamples
from weakclip.datasets.writing import Build
from weakclip.masks.seeds import cam_maps, refined_seed
from weakclip.runtime.workers import WorkerPool
from weakclip.training import jobs

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
    fixed = (f"data.train={tmp_path}/cams", f"data.labelled={labelled.root}", "cam.prompts=['{}']", "cam.background_names=[boat]")
    return lambda *more: tiny_config(*fixed, *more)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_but_the_cams_stays_as_it_is(config, labelled, capsys):
    make.run(config(), None)
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
    make.run(config(), None)
    parts = config(f"data.train={tmp_path}/parts")
    for part in ("2:3", "0:1", "1:2"):
        assert not Path(parts.data.train).exists()
        make.run(parts, part)
    assert contents(tmp_path / "parts") == contents(tmp_path / "cams")
    make.run(parts, "0:1")  # by a job that started late


def test_what_was_stopped_makes_only_what_is_missing(config, labelled, tmp_path, monkeypatch):
    make.run(config(), "0:2")
    assert make.written(config(), labelled) == 2
    made, cam = [], PromptedClip.cam
    monkeypatch.setattr(
        PromptedClip, "cam", lambda self, sample, template: made.append(sample.name) or cam(self, sample, template)
    )
    make.run(config(), None)
    assert made == ["image_3", "image_4", "image_5"]
    assert make.written(config(), labelled) == len(Index.load(tmp_path / "cams").shards) == 3


def test_images_without_a_label_are_named(config, caplog):
    make.run(config(), "1:2")
    assert ("weakclip.cams.make", logging.WARNING, "1 images have no label and get no CAM: image_2") in caplog.record_tuples
    caplog.clear()
    make.run(config(), "2:3")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_empty_maps_are_counted_by_class(labelled):
    def of_cats_alone(sample):
        maps_nhw = np.zeros((len(sample.classes), *sample.size), np.uint8)
        maps_nhw[[index == 1 for index in sample.classes]] = 7
        return Cam(sample.classes, maps_nhw, 1.0)

    load = make.WithCam(labelled, of_cats_alone, SeedConfig(), WorkerPool(0))
    for entry in labelled.entries:
        load(entry)
    assert load.warnings()[1] == "6 maps are all zero, by class: dog 3, cow 3"


def test_seeds_refined_by_a_crf_stand_beside_the_cams(config, labelled, tmp_path):
    options = ("seeds.crf={iterations: 2}", "seeds.background=0.2", "seeds.foreground=0.6")
    refined = config(*options)
    make.run(refined, None)
    index = Index.load(refined.data.train)
    for sample in StoredSamples(index, index.entries, 0):
        if sample.classes:
            wanted = refined_seed(cam_maps(sample), sample.cam.classes, sample.image, 0.2, 0.6, CrfConfig(iterations=2))
            np.testing.assert_array_equal(sample.seed, wanted)
        else:
            assert sample.seed is None
    with pytest.raises(ConfigError, match="cams was made with another cam"):
        make.written(config(*options[:2], "seeds.foreground=0.5"), labelled)


def test_the_bytes_do_not_depend_on_the_number_of_images_in_progress(config, tmp_path):
    found = []
    for processes in (0, 1, 3):
        out = tmp_path / str(processes)
        make.run(config(f"data.train={out}", f"pseudo.processes={processes}", "seeds.crf={iterations: 2}"), None)
        found.append(contents(out))
    assert found[0] == found[1] == found[2]


def test_refined_seeds_need_the_stage_that_makes_them(tiny_config):
    with pytest.raises(ConfigError, match="^seeds.crf: the stage cam computes these seeds, but data.labelled is null"):
        jobs.refine(tiny_config("seeds.crf={iterations: 2}"))


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
    make.run(several, "0:1")
    noted = json.loads((tmp_path / "cams.partial" / "build.json").read_text())
    assert noted["prompt"] == min(expected, key=expected.__getitem__)


def test_later_parts_take_the_prompt_of_the_first(config, tmp_path, monkeypatch):
    several = config("cam.prompts=['{}', 'boat {}']")
    monkeypatch.setattr(PromptedClip, "sharpness", lambda self, samples: {"{}": 1.0, "boat {}": 0.5})
    make.run(several, "0:1")
    monkeypatch.setattr(PromptedClip, "sharpness", lambda self, samples: {"{}": 0.0, "boat {}": 0.5})
    make.run(several, "1:3")
    assert json.loads((tmp_path / "cams" / "build.json").read_text())["prompt"] == "boat {}"


def test_synonyms_stand_for_names(config):
    plain, other = (PromptedClip(config(*more), NAMES).texts["{}"] for more in ((), ("cam.synonyms={cow: sheep}",)))
    assert plain.classes_FE[:2].equal(other.classes_FE[:2]) and not plain.classes_FE[2].equal(other.classes_FE[2])


def test_sets_of_other_origin_or_options_are_left_alone(config, make_shards, tmp_path):
    make.run(config(), "0:1")
    before = contents(tmp_path / "cams.partial")
    with pytest.raises(ValueError, match="data.train: .*cams.partial was made with another cam .see build.json"):
        make.run(config("cam.flip=true"), "1:2")
    assert contents(tmp_path / "cams.partial") == before
    make_shards(tmp_path / "foreign")
    with pytest.raises(ValueError, match="foreign was not made by cam; remove it, or leave cam out"):
        make.run(config(f"data.train={tmp_path}/foreign"), None)


def test_cams_of_other_weights_are_left_alone_wherever_these_lie(config, save_tiny_clip, tmp_path):
    make.run(config(), "0:1")
    same = save_tiny_clip(tmp_path / "elsewhere")
    assert make.written(config(f"clip.pretrained={same}"), None) == 1
    (same / "open_clip_model.safetensors").write_bytes(b"another")
    with pytest.raises(ConfigError, match="cams.partial was made with another cam"):
        make.written(config(f"clip.pretrained={same}"), None)
    assert make.written(config(f"clip.pretrained={tmp_path}/nowhere"), None) == 1  # not available yet, or no longer


def test_cams_of_a_clip_that_open_clip_downloads_are_those_of_its_name(config):
    def weights(*changes: str) -> str:
        return make.provenance(config("clip.model=ViT-B-16", *changes), None)["weights"]

    assert weights("clip.pretrained=laion2b_s34b_b88k") == "laion2b_s34b_b88k"
    assert weights("clip.pretrained=hf-hub:org/name", "clip.model=null") == "hf-hub:org/name"


def test_a_clip_that_was_trained_with_another_normalisation_makes_no_cams(config, save_tiny_clip, tmp_path):
    settings = save_tiny_clip(tmp_path / "other") / "open_clip_config.json"
    half = {"preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | half))
    with pytest.raises(ConfigError, match="cam.normalisation is clip, but clip.pretrained was trained with mean 0.5, 0.5, 0.5"):
        PromptedClip(config(f"clip.pretrained={settings.parent}"), NAMES)
    right = config(f"clip.pretrained={settings.parent}", "cam.normalisation=source")
    assert PromptedClip(right, NAMES).normalisation.std == (127.5,) * 3
