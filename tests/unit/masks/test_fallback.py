"""Images too large for memory, and errors that are not mistaken for out of memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from weakclip import pseudo
from weakclip.data.stream import StoredSamples
from weakclip.masks import mask_folder, sliding_window
from weakclip.masks.curves import Curves
from weakclip.masks.mask_folder import MaskSettings
from weakclip.masks.writing import write_masks
from weakclip.runtime.workers import WorkerPool

SCALES = ("pseudo.scales=[0.5,1.0,1.5]", "pseudo.flip=true", "pseudo.soft=true", "pseudo.crf.iterations=2")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_shards):
    return make_shards(tmp_path_factory.mktemp("pseudo") / "set", 7, 2, H=70, W=90)


def run(config, data: str, weights: Path, out: Path, part: str | None = None) -> Path:
    """The stage's masks of a shard set, in `out`, which is returned."""
    pseudo.run(config, data, weights, out, part)
    return out


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".png", ".npz")}


def of_torch_on_the_cpu() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    return caught.value


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), of_torch_on_the_cpu()])
def test_an_image_too_large_is_done_in_parts_and_said_to_be(tiny_config, weights, shards, tmp_path, monkeypatch, caplog, error):
    config = tiny_config(*SCALES)
    want = written(run(config, str(shards.root), weights, tmp_path / "want", "0"))
    caplog.clear()

    def too_large(*_arguments):
        raise error

    monkeypatch.setattr(sliding_window, "predict_tiles", too_large)
    out = run(config, str(shards.root), weights, tmp_path / "out", "0")
    one, strips, *_ = caplog.messages
    assert one == "image_0: out of memory with 70 x 90 pixels; trying again with one window at a time"
    assert strips == "image_0: out of memory with 70 x 90 pixels; trying again strip by strip"
    for key in ("image_0", "image_1"):
        assert (mask_folder.read(out, key) == np.array(Image.open(tmp_path / "want" / f"{key}.png"))).mean() > 0.999
    assert {*written(out)} == {*want} and len(want) == 4


def test_an_image_too_large_even_in_parts_is_an_error_that_names_it(tiny_config, weights, shards, tmp_path, monkeypatch):
    def too_large(*_arguments):
        raise MemoryError

    monkeypatch.setattr(sliding_window, "predict_tiles", too_large)
    monkeypatch.setattr(sliding_window, "predict_in_strips", too_large)
    with pytest.raises(ValueError, match="image_0: out of memory with 70 x 90 pixels, even strip by strip"):
        run(tiny_config(), str(shards.root), weights, tmp_path / "out")


def test_an_image_too_large_beside_others_on_a_gpu_is_done_alone_at_the_end(
    tiny_config, tiny_model, shards, tmp_path, monkeypatch
):
    on_cpu, order = tiny_model().predictor(), []
    of_a_gpu = on_cpu._replace(device=torch.device("cuda"))
    tiles, samples = sliding_window.predict_tiles, [*StoredSamples(shards, shards.entries, 0)]

    def crowded(_predictor, image_HW3, *arguments):
        order.append(next(sample.name for sample in samples if sample.image is image_HW3))
        if order[-1] == "image_1" and "image_6" not in order:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tiles(on_cpu, image_HW3, *arguments)

    monkeypatch.setattr(sliding_window, "predict_tiles", crowded)
    monkeypatch.setattr(sliding_window, "predict_in_strips", crowded)
    settings, curves = MaskSettings.of(tiny_config(*SCALES)), Curves(tmp_path / "board", 0)
    write_masks(of_a_gpu, settings, samples, tmp_path, curves, WorkerPool(0))
    assert len(written(tmp_path)) == 14 and order[-1] == "image_1"


def test_other_errors_of_the_network_are_not_taken_for_want_of_memory(tiny_config, weights, shards, tmp_path, monkeypatch):
    def wrong(*_arguments):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(sliding_window, "predict_tiles", wrong)
    with pytest.raises(RuntimeError, match="shapes"):
        run(tiny_config(), str(shards.root), weights, tmp_path / "out")
