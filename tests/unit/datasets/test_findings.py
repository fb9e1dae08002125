"""What is reported of labels, CAMs, seeds and masks that disagree."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from weakclip.data.index import Index, ShardError
from weakclip.data.sample import Cam, Sample
from weakclip.datasets import stats, verify
from weakclip.datasets.writing import Build

NAMES = ("background", "cat", "dog", "cow")
H, W = 6, 8


@pytest.fixture
def make(tmp_path, png_of):
    """Builds a set of samples that differ in some fields, and returns its directory."""

    def build(*changes: dict, strict: bool = False, **options) -> Index:
        def load(number: int) -> Sample:
            fields = {"classes": (1,), **changes[number]}
            fields |= {part: png_of(fields[part]) for part in ("seed", "mask") if isinstance(fields.get(part), np.ndarray)}
            return Sample(
                f"image_{number}", png_of(np.zeros((H, W, 3), np.uint8)), "png", height=H, width=W, source="m", **fields
            )

        items = [*range(len(changes))]
        return Build(items, load, tmp_path / "set", NAMES, 2, strict=strict).run()

    return build


def mask(*values: int) -> np.ndarray:
    mask_HW = np.zeros((H, W), np.uint8)
    mask_HW.flat[: len(values)] = values
    return mask_HW


def cam(*classes: int) -> Cam:
    return Cam(classes, np.zeros((len(classes), H, W), np.uint8), 1.0)


CASES = {
    "no map": ({"classes": (1, 2), "cam": cam(1)}, "1 images: the CAM has no map of a class .*\\(by class: dog 1\\): image_0"),
    "seed": ({"seed": mask(1, 3)}, r"1 images: the seed holds a class that the image is not labelled with \(by class: cow 1\)"),
    "mask": ({"mask": mask(1, 3, 2)}, r"the mask holds a class .* \(by class: dog 1, cow 1\): image_0"),
    "0 and 255": ({"mask": mask(255, 255)}, "1 images: the mask holds no class, only 0 and 255"),
    "0 and 255 without labels": ({"classes": (), "mask": mask(255)}, "the mask holds no class, only 0 and 255"),
    "0 alone": ({"seed": mask(0)}, "the seed holds no class, only 0 and 255"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_disagreement_is_a_warning_at_build_and_an_error_when_strict(make, caplog, case):
    changes, message = CASES[case]
    with pytest.raises(ShardError, match=r"m: image_0: --strict: the "):
        make(changes, {"cam": cam(1)}, strict=True)
    index = make(changes, {"cam": cam(1)})
    assert len(caplog.messages) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(caplog.messages[0])
    assert index.root.is_dir()


@pytest.mark.parametrize("case", CASES)
def test_verify_and_stats_report_the_same(make, caplog, capsys, case, tmp_path):
    make(CASES[case][0], {"cam": cam(1)})
    (line,) = caplog.messages
    caplog.clear()
    verify.main([str(tmp_path / "set"), "--processes", "1"])
    assert caplog.messages == [line] and "0 problems" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        verify.main([str(tmp_path / "set"), "--processes", "1", "--strict"])
    assert "1 problems" in capsys.readouterr().out
    stats.main([str(tmp_path / "set"), "--processes", "1", "--json", str(tmp_path / "stats.json")])
    assert line in capsys.readouterr().out
    assert json.loads((tmp_path / "stats.json").read_text())["disagreements"] == [line]
    with pytest.raises(ShardError, match="--strict: 1 images"):
        stats.main([str(tmp_path / "set"), "--processes", "1", "--strict"])


def test_parts_that_agree_are_not_reported(make, caplog):
    make(
        {"cam": cam(1)},
        {"classes": (1, 3), "cam": cam(1), "seed": mask(1, 3), "mask": mask(3, 255)},
        {"classes": (), "mask": mask(2)},  # nobody labelled it
        strict=True,
    )
    assert not caplog.messages


def palette_png(png_of, order: list[int]) -> bytes:
    """A mask of classes 1 and 2 whose palette has the colours of three classes in this order."""
    image = Image.fromarray(mask(1, 2))
    colours = [(0, 0, 0), (200, 0, 0), (0, 200, 0)]
    image.putpalette([value for index in order for value in colours[index]])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_palette_in_another_order_than_its_neighbours(make, caplog, png_of, tmp_path):
    usual, other = palette_png(png_of, [0, 1, 2]), palette_png(png_of, [0, 2, 1])
    samples = [{"classes": (1, 2), "mask": data} for data in (usual, usual, other)]
    with pytest.raises(ShardError, match="--strict: 1 masks, such as that of image_2, have colour #c80000 for dog, 2 .*cat"):
        make(*samples, strict=True)
    shutil.rmtree(tmp_path / "set.partial")
    make(*samples[:2])
    assert not caplog.messages
