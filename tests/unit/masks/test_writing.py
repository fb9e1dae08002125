"""Writing masks: their pixels; arrays, restarts, full disks and broken networks; and the messages."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from weakclip import pseudo
from weakclip.checkpoints import weights as stored
from weakclip.data.stream import StoredSamples
from weakclip.masks import mask_folder, sliding_window
from weakclip.masks.curves import Curves
from weakclip.masks.fallback import likely_classes
from weakclip.masks.finishing import mask_of
from weakclip.masks.mask_folder import MaskSettings
from weakclip.masks.writing import write_masks
from weakclip.runtime.workers import WorkerPool

NO_CRF = "pseudo.crf=null"


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_shards):
    return make_shards(tmp_path_factory.mktemp("pseudo") / "set", 7, 2, H=70, W=90)


def run(config, data: str, weights: Path, out: Path, part: str | None = None) -> Path:
    """The stage's masks of a shard set, in `out`, which is returned."""
    pseudo.run(config, data, weights, out, part)
    return out


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".png", ".npz")}


# ---------------------------------------------------------------------------------------------------------------------- pixels


def predicted(probs_KHW, monkeypatch, config, classes=(1,)) -> np.ndarray:
    H, W = probs_KHW.shape[1:]
    sample = SimpleNamespace(name="made up", image=np.full((H, W, 3), 128, np.uint8), classes=classes)
    monkeypatch.setattr(sliding_window, "predict_tiles", lambda *_: [[torch.tensor(probs_KHW)]])
    return mask_of(likely_classes(None, sample, MaskSettings.of(config)), sample.image, config.pseudo.crf)


def columns(*probs: list[float]) -> np.ndarray:
    """Each argument is the probabilities of a column of pixels: K x 8 x columns."""
    return np.repeat(np.array(probs, np.float32).T[:, None], 8, axis=1)


def test_without_crf_the_mask_is_the_likeliest_class(tiny_config, monkeypatch):
    mask_HW = predicted(columns([0.6, 0.3, 0.1], [0.1, 0.3, 0.6], [0.2, 0.5, 0.3]), monkeypatch, tiny_config(NO_CRF))
    assert mask_HW.dtype == np.uint8 and mask_HW[0].tolist() == [0, 2, 1]


def test_restricting_to_labels_leaves_background_and_present_classes(tiny_config, monkeypatch):
    probs_KHW = columns([0.4, 0.0, 0.6], [0.1, 0.3, 0.6], [0.2, 0.5, 0.3])
    config = tiny_config(NO_CRF, "pseudo.restrict_to_labels=true")
    assert predicted(probs_KHW, monkeypatch, config, classes=(1,))[0].tolist() == [0, 1, 1]
    assert not predicted(probs_KHW, monkeypatch, config, classes=()).any()
    crf = tiny_config("pseudo.restrict_to_labels=true")
    assert 2 not in predicted(probs_KHW.repeat(8, axis=2), monkeypatch, crf, classes=(1,))


def test_the_crf_smooths_unless_it_is_null(tiny_config, monkeypatch):
    probs_KHW = np.repeat(columns([0.9, 0.1]), 9, axis=2)
    probs_KHW[:, 4, 4] = 0.4, 0.6
    assert predicted(probs_KHW, monkeypatch, tiny_config(NO_CRF)).sum() == 1
    assert not predicted(probs_KHW, monkeypatch, tiny_config()).any()


# -------------------------------------------------------------------------------------------------------------- the same masks


SCALES = ("pseudo.scales=[0.5,1.0,1.5]", "pseudo.flip=true", "pseudo.soft=true", "pseudo.crf.iterations=2")


def test_four_tasks_write_the_bytes_of_one_whatever_is_there_already(tiny_config, weights, shards, tmp_path):
    alone = run(tiny_config(*SCALES), str(shards.root), weights, tmp_path / "alone")
    for part in ("0:1", "1:2", "2:3", "3:4"):
        run(tiny_config(*SCALES), str(shards.root), weights, tmp_path / "array", part)
    assert written(tmp_path / "array") == written(alone) and len(written(alone)) == 14
    for name in ("image_1.png", "image_2.png", "image_2.npz", "image_6.npz"):
        (tmp_path / "array" / name).unlink()
    run(tiny_config(*SCALES), str(shards.root), weights, tmp_path / "array")
    assert written(tmp_path / "array") == written(alone)


def test_a_stop_between_two_masks_is_made_up_for(tiny_config, weights, shards, tmp_path, monkeypatch):
    config = tiny_config(*SCALES)
    alone = run(config, str(shards.root), weights, tmp_path / "alone")
    save, saved = mask_folder.save, []

    def stop_at_the_third(mask_HW, path):
        if len(saved) == 2:
            raise KeyboardInterrupt
        save(mask_HW, path)
        saved.append(path)

    monkeypatch.setattr(mask_folder, "save", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(config, str(shards.root), weights, tmp_path / "out")
    assert len([*(tmp_path / "out").glob("*.png")]) == 2
    monkeypatch.setattr(mask_folder, "save", save)
    assert written(run(config, str(shards.root), weights, tmp_path / "out")) == written(alone)


def test_masks_have_the_names_of_their_images(tiny_config, weights, make_shards, tmp_path):
    names = ["trip/Fähre 1.2", "a\nb", "ä" * 120]
    data = make_shards(tmp_path / "set", 3, 2, names=names)
    out = run(tiny_config(NO_CRF, "pseudo.soft=true"), str(data.root), weights, tmp_path / "out")
    (out / "trip/Fähre 1.2.png.0123abcd.partial").touch()
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {"about.json"}
    assert found - {"trip/Fähre 1.2.png.0123abcd.partial"} == {f"{name}.{suffix}" for name in names for suffix in ("png", "npz")}
    (out / "trip/Fähre 1.2.png").unlink()
    run(tiny_config(NO_CRF, "pseudo.soft=true"), str(data.root), weights, out)
    assert (out / "trip/Fähre 1.2.png").is_file() and not [*out.rglob("*.partial")]


def test_processes_and_soft_are_no_other_masks(tiny_config, weights, shards, tmp_path):
    first = written(run(tiny_config(NO_CRF), str(shards.root), weights, tmp_path / "out"))
    again = written(run(tiny_config(NO_CRF, "pseudo.soft=true"), str(shards.root), weights, tmp_path / "out"))
    assert len(again) == 14 and first.items() <= again.items()


def test_a_mask_that_another_job_wrote_meanwhile_is_kept(tiny_config, tiny_model, shards, tmp_path):
    samples = [*StoredSamples(shards, shards.entries, 0)]
    (tmp_path / "image_1.png").write_bytes(b"kept")
    settings, curves = MaskSettings.of(tiny_config(NO_CRF)), Curves(tmp_path / "board", 0)
    write_masks(tiny_model().predictor(), settings, samples, tmp_path, curves, WorkerPool(0))
    assert len(written(tmp_path)) == 7 and written(tmp_path)["image_1.png"] == b"kept"


# --------------------------------------------------------------------------------------------------------------- probabilities


def test_soft_probabilities_are_those_of_the_occurring_classes(tiny_config, tiny_model, weights, shards, tmp_path):
    config = tiny_config(NO_CRF, "pseudo.soft=true")
    out = run(config, str(shards.root), weights, tmp_path / "out")
    image_HW3 = np.random.default_rng(3).integers(0, 256, (70, 90, 3), np.uint8)
    image_HW3[0, 0] = 3
    want_KHW = sliding_window.predict(tiny_model().predictor(), image_HW3, config.pseudo, config.data.scale).numpy()
    with np.load(out / "image_3.npz") as found:
        assert found["classes"].tolist() == np.unique(want_KHW.argmax(0)).tolist()
        assert found["probs"].dtype == np.uint8
        np.testing.assert_allclose(found["probs"] / 255, want_KHW[found["classes"]], atol=0.502 / 255)


def test_a_network_that_gives_no_numbers_names_image_and_weights(tiny_config, tiny_model, weights, shards, tmp_path):
    model = tiny_model()
    model.decoder.head.classify.weight.data[1] = 3e38  # NaN itself would be refused with the weights
    stored.save(model, weights, step=3)
    with pytest.raises(ValueError, match="last.safetensors: image_0: the network's probabilities are not finite numbers"):
        run(tiny_config(), str(shards.root), weights, tmp_path / "out")
    assert not written(tmp_path / "out")


def test_images_without_labels_are_background_and_named_once(tiny_config, weights, make_shards, tmp_path, caplog):
    unlabelled = make_shards(tmp_path / "set", 12, 12, classes=(), cam=None, seed=None, mask=None)
    config = tiny_config(NO_CRF, "pseudo.restrict_to_labels=true")
    out = run(config, str(unlabelled.root), weights, tmp_path / "out")
    assert not any(mask_folder.read(out, f"image_{n}").any() for n in range(12))
    (line,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "12 images have no label" in line and "image_0, image_1" in line and line.endswith("image_9, ...")


# ------------------------------------------------------------------------------------------------------------------ full disks


@pytest.mark.parametrize("name", ["image_0.png", "image_0.npz"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half(tiny_config, weights, shards, tmp_path, monkeypatch, name):
    write_bytes = Path.write_bytes

    def fill(path: Path, data: bytes) -> int:
        if not path.name.startswith(name):
            return write_bytes(path, data)
        write_bytes(path, data[:100])
        raise OSError(28, "No space left on device")  # as when write(2) fails, without a file name

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(OSError, match=f"No space left on device: '.*out/{name}'"):
        run(tiny_config("pseudo.soft=true"), str(shards.root), weights, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"about.json", "image_0.npz"} - {name}


# --------------------------------------------------------------------------------------------------------------- what is shown


def test_curves_and_the_last_line_say_how_it_went(tiny_config, weights, make_shards, tmp_path, caplog):
    many = make_shards(tmp_path / "set", 25, 25)
    config = tiny_config(NO_CRF)
    caplog.set_level("INFO")
    out = run(config, str(many.root), weights, tmp_path / "pseudo", "0:1")
    board = EventAccumulator(str(Path(config.run) / "tensorboard/pseudo/shards-0-1"), size_guidance={"histograms": 0}).Reload()
    assert {"images_per_second", "entropy", "seed_agreement_percent"} <= {*board.Tags()["scalars"]}
    assert [point.step for point in board.Scalars("entropy")] == [20, 25]
    assert 0 < board.Scalars("entropy")[0].value <= np.log(4)
    seed_HW = np.zeros((48, 64), np.uint8)
    seed_HW[:, :32] = 1
    agreements = [100 * (mask_folder.read(out, f"image_{n}") == seed_HW).mean() for n in range(25)]
    assert board.Scalars("seed_agreement_percent")[0].value == pytest.approx(np.mean(agreements[:20]), abs=1e-3)
    shares = (
        np.mean([np.bincount(mask_folder.read(out, f"image_{n}").ravel(), minlength=4) for n in range(20, 25)], axis=0) / 48 / 64
    )
    assert board.Histograms("classes")[1].histogram_value.bucket == pytest.approx(shares.tolist(), abs=1e-6)
    last = [record.getMessage() for record in caplog.records if record.name.startswith("weakclip.masks.")][-1]
    assert last.startswith("25 masks, ") and last.endswith(f"{np.mean(agreements):.1f} % of seeded pixels agree on average")


def classes_beyond_labels(caplog, config, data: str, weights: Path, out: Path, part: str | None = None) -> list[str]:
    """The lines about such classes that a stage or one of its tasks ends with."""
    caplog.clear()
    run(config, data, weights, out, part)
    return [record.getMessage() for record in caplog.records if "not labelled with" in record.getMessage()]


@pytest.mark.parametrize("processes", [0, 2])
def test_each_task_counts_its_masks_with_classes_that_the_labels_exclude(
    tiny_config, weights, shards, tmp_path, caplog, processes
):
    caplog.set_level("INFO")
    config, data = tiny_config(NO_CRF, f"pseudo.processes={processes}"), str(shards.root)
    (whole,) = classes_beyond_labels(caplog, config, data, weights, tmp_path / "whole")
    beyond = [not {0, 1}.issuperset(np.unique(mask_folder.read(tmp_path / "whole", f"image_{n}"))) for n in range(7)]
    assert any(beyond)  # every image is labelled with class 1
    assert whole == (
        f"masks of {sum(beyond)} of 7 labelled images have a class that the image is not labelled with; "
        "pseudo.restrict_to_labels=true gives such pixels to the image's labels or the background"
    )
    parts = [classes_beyond_labels(caplog, config, data, weights, tmp_path / "array", part) for part in ("0:1", "1:4")]
    counts = [f"masks of {sum(each)} of {len(each)} labelled images" for each in (beyond[:2], beyond[2:]) if any(each)]
    assert [line.partition(" have")[0] for lines in parts for line in lines] == counts
    assert classes_beyond_labels(caplog, config, data, weights, tmp_path / "array") == []  # nothing was left to write


def test_masks_that_keep_to_the_labels_and_images_without_any_are_not_counted(
    tiny_config, weights, shards, make_shards, tmp_path, caplog
):
    caplog.set_level("INFO")
    kept = tiny_config(NO_CRF, "pseudo.restrict_to_labels=true")
    assert classes_beyond_labels(caplog, kept, str(shards.root), weights, tmp_path / "kept") == []
    unlabelled = make_shards(tmp_path / "set", 3, 3, classes=(), cam=None, seed=None, mask=None)
    assert classes_beyond_labels(caplog, tiny_config(NO_CRF), str(unlabelled.root), weights, tmp_path / "out") == []
