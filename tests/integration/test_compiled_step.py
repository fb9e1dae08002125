"""Compiled regions give what eager mode gives, in training and in inference, and a step reads nothing from the device."""

from __future__ import annotations

import pytest
import torch

from tests.integration.conftest import metrics
from weakclip import recipe
from weakclip.data.photometric import distort
from weakclip.models.interface import Targets
from weakclip.runtime import compilation


def test_a_compiled_training_has_the_losses_of_an_eager_one(launch, tiny_recipe, make_shards, tmp_path):
    shards = make_shards(tmp_path / "shards", count=8, per_shard=4)
    losses = {}
    for compiled in ("off", "on"):
        run = tmp_path / compiled
        given = (
            f"run={run}",
            f"data.train={shards.root}",
            "train.steps=4",
            "train.log_every=1",
            "optim.warmup=2",
            "optim.lr=1e-3",
        )
        done = launch(0, "weakclip.train", "--config", tiny_recipe, *given, f"train.compile={compiled}", "boundary.engine=exact")
        assert "could not be compiled" not in done.stderr
        losses[compiled] = metrics(run)
    assert losses["on"] == pytest.approx(losses["off"], rel=1e-5) and len(losses["on"]) == 4


def test_a_compiled_region_gives_the_same_in_inference(tiny_model, caplog):
    matching, texts_KE, global_BE, visual_BEhw = tiny_model().matching, *map(torch.randn, [(5, 32), (2, 32), (2, 32, 4, 4)])
    with torch.inference_mode():
        eager = matching(texts_KE, global_BE, visual_BEhw)
        with compilation.in_turn(one_shape=True):
            compiled = matching(texts_KE, global_BE, visual_BEhw)
    assert "could not be compiled" not in caplog.text
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(("engine", "reads"), [("exact", False), ("lattice", True)])
def test_a_step_reads_nothing_from_the_device_but_the_lattices_input(launch, tiny_recipe, tmp_path, engine, reads):
    config = recipe.load(tiny_recipe, [f"run={tmp_path}/run", f"boundary.engine={engine}"])
    recipe.save(config, tmp_path / "config.yaml")
    done = launch(1, "tests.integration.count_reads", tmp_path / "config.yaml")
    assert ("losses.py" in done.stdout.splitlines()[-1]) == reads and (done.stdout.splitlines()[-1] == "{}") != reads


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_forward_and_backward_pass_never_wait_for_a_gpu(tiny_model):
    model = tiny_model().cuda().train()
    images_B3HW = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, device="cuda")
    seeds_BHW, draws_B5 = torch.ones(2, 64, 64, dtype=torch.int64, device="cuda"), torch.zeros(2, 5, device="cuda")
    for mode in ("default", "error"):  # constants are copied once
        torch.cuda.set_sync_debug_mode(mode)
        try:
            images = model.normalisation.apply(distort(images_B3HW, draws_B5))
            targets = Targets(images, seeds_BHW, seeds_BHW[:, 0, :4].byte())
            sum(model.losses(model(images), targets).values()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
