"""From shards to batches: the same for any number of ranks and workers, with bad samples skipped, and resumable."""

from __future__ import annotations

from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from weakclip.data.index import Index, ShardError, open_index, select_shards
from weakclip.data.plan import Mix, Order
from weakclip.data.reading import read_entry
from weakclip.data.sample import Cam, decode_sample
from weakclip.data.stream import Batch, StoredSamples, StreamSettings, training_batches
from weakclip.masks.seeds import cam_maps, seed_mask

NAMES = ("background", "cat", "dog", "cow")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_shards) -> Index:
    """Seven samples in shards of 3, 3 and 1."""
    return make_shards(tmp_path_factory.mktemp("stream") / "set")


def batches(index: Index, config, count: int, **where: int) -> list[Batch]:
    return list(
        islice(training_batches(index, StreamSettings.of(config), partial(seed_mask, config=config.seeds), **where), count)
    )


def same(first: Batch, second: Batch) -> bool:
    tensors = ("images", "seeds", "labels", "photometric")
    return first.keys == second.keys and all(getattr(first, name).equal(getattr(second, name)) for name in tensors)


def joined(parts: list[Batch]) -> Batch:
    keys, *tensors, bad = zip(*parts, strict=True)
    return Batch([*chain(*keys)], *map(torch.cat, tensors), [*chain(*bad)])


def damage(index: Index, *numbers: int) -> None:
    """Overwrite the middle of these samples' bytes, where their picture lies."""
    for number in numbers:
        entry = index.entries[number]
        with open(index.root / entry.shard, "r+b") as file:
            file.seek(entry.offset + 700)
            file.write(b"\xff" * 2000)


def decoded(index: Index, number: int = 0):
    entry = index.entries[number]
    return decode_sample(read_entry(index, entry), entry, len(NAMES))


# ------------------------------------------------------------------------------------------------------------- training


def test_batches_have_the_shapes_and_types_they_promise(shards, tiny_config):
    (batch,) = batches(shards, tiny_config("train.batch=3"), 1)
    assert batch.images.shape == (3, 3, 64, 64) and batch.images.dtype == torch.uint8
    assert batch.seeds.shape == (3, 64, 64) and batch.seeds.dtype == torch.uint8
    assert batch.photometric.shape == (3, 5) and batch.photometric.dtype == torch.float32
    assert len(batch.keys) == 3 and batch.bad == [] and set(batch.seeds.unique().tolist()) <= {0, 1, 255}


def test_batches_are_the_same_over_one_rank_and_over_two_ranks_with_workers(shards, tiny_config):
    alone = batches(shards, tiny_config("train.batch=4"), 5)
    config = tiny_config("train.batch=2", "data.workers=2")
    ranks = [batches(shards, config, 5, rank=rank, ranks=2) for rank in range(2)]
    for step, batch in enumerate(alone):
        assert same(batch, joined([of_rank[step] for of_rank in ranks]))


def test_keys_follow_the_plan_and_every_sample_comes_once_an_epoch(shards, tiny_config):
    config = tiny_config("train.batch=1", "seed=5")
    plan = Order((3, 3, 1), (5, 0), config.data.shuffle_window)
    keys = [batch.keys[0] for batch in batches(shards, config, 14)]
    assert keys == [f"image_{plan.sample(position)[1]}" for position in range(14)]
    assert sorted(keys[:7]) == sorted(keys[7:]) == [f"image_{n}" for n in range(7)]


def test_mixed_sets_come_by_their_weights_each_through_its_own_epochs(shards, make_shards, tiny_config, tmp_path):
    other = make_shards(tmp_path / "other", count=2, H=32)
    config = tiny_config("train.batch=1", f"data.mix={{{other.root}: 0.5}}", "seed=3")
    found = batches(shards, config, 60, mixed=[other])
    sources = [Mix((1, 0.5), 3).at(position)[0] for position in range(60)]
    first, second = ([batch.keys[0] for batch, source in zip(found, sources, strict=True) if source == s] for s in (0, 1))
    alone = batches(shards, tiny_config("train.batch=1", "seed=3"), len(first))
    assert first == [batch.keys[0] for batch in alone]
    assert all(sorted(second[i : i + 2]) == ["image_0", "image_1"] for i in range(0, len(second) - 1, 2)) and len(second) > 10
    resumed = batches(shards, config, 10, mixed=[other], consumed=50)
    assert all(same(a, b) for a, b in zip(found[50:], resumed, strict=True))


def test_reduced_jpegs_are_the_same_with_and_without_loader_processes(tmp_path, make_shards, jpeg_of, tiny_config):
    """At 1/2, 3/8, 1/4 or 1/8: the pictures are 400 x 600, the crops are of some 32 to 128 x 48 to 192."""
    spots = np.random.default_rng(0).integers(0, 256, (50, 75, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    index = make_shards(tmp_path / "set", H=400, W=600, image=jpeg_of(spots), image_ext="jpg")
    alone = batches(index, tiny_config("train.batch=2"), 7)
    assert all(same(a, b) for a, b in zip(alone, batches(index, tiny_config("data.workers=2"), 7), strict=True))
    assert len({batch.images.numpy().tobytes() for batch in alone}) == 7


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_where_the_other_one_would_have(shards, tiny_config, workers):
    config = tiny_config(f"data.workers={workers}")
    whole, resumed = batches(shards, config, 8), batches(shards, config, 3, consumed=10)
    assert all(same(a, b) for a, b in zip(whole[5:], resumed, strict=True))


def test_a_sample_is_augmented_anew_each_epoch_and_by_the_seed(shards, tiny_config):
    def pictures(*overrides: str) -> list[torch.Tensor]:
        config = tiny_config("train.batch=1", *overrides)
        return [b.images for b in batches(shards, config, 14) if b.keys == ["image_3"]]

    first, second = pictures()
    other, _ = pictures("seed=1")
    assert not first.equal(second) and not first.equal(other)


def test_a_damaged_sample_is_replaced_by_its_successor_and_named(tmp_path, make_shards, tiny_config):
    index = make_shards(tmp_path / "set")
    damage(index, 4)
    config = tiny_config("train.batch=1")
    plan = Order((3, 3, 1), (0, 0), config.data.shuffle_window)
    place = next(p for p in range(7) if plan.sample(p)[1] == 4)
    found = batches(index, config, 7)
    successor = list(plan.successors(place))[1][1]
    assert found[place].keys == [f"image_{successor}"]
    assert len(found[place].bad) == 1 and "shard-00001.tar: image_4" in found[place].bad[0]
    assert all(batch.bad == [] for number, batch in enumerate(found) if number != place)


def test_a_damaged_jpeg_is_noticed_though_it_is_decoded_last(tmp_path, make_shards, jpeg_of, tiny_config):
    data = jpeg_of(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    index = make_shards(tmp_path / "set", 3, image=data, image_ext="jpg")
    entry = index.entries[1]
    with open(index.root / entry.shard, "r+b") as file:
        file.seek(entry.offset)
        at = file.read(entry.length).index(data)
        file.seek(entry.offset + at + 100)
        file.write(bytes(400))  # its tables
    found = batches(index, tiny_config("train.batch=1"), 3)
    assert "image_1" not in [batch.keys[0] for batch in found]
    (message,) = [message for batch in found for message in batch.bad]
    assert "shard-00000.tar: image_1: jpg cannot be decoded" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_damaged_samples_stop_the_stream_and_name_the_option(tmp_path, make_shards, tiny_config, workers):
    index = make_shards(tmp_path / "set")
    damage(index, *range(7))
    with pytest.raises(ShardError, match=r"more than data.max_bad_samples=2 unreadable samples; the last: .*image_\d"):
        batches(index, tiny_config("data.max_bad_samples=2", f"data.workers={workers}"), 1)


def test_a_set_without_a_readable_sample_ends_even_where_more_would_be_allowed(tmp_path, make_shards, tiny_config):
    index = make_shards(tmp_path / "set")
    damage(index, *range(7))
    with pytest.raises(ShardError, match="unreadable samples"):
        batches(index, tiny_config("data.max_bad_samples=100"), 1)


# ---------------------------------------------------------------------------------------------------------------- seeds


def test_a_samples_own_seed_comes_before_its_cam(shards, tiny_config):
    sample = decoded(shards)
    np.testing.assert_array_equal(seed_mask(sample, tiny_config().seeds), sample.seed)


def test_a_cam_becomes_a_seed_by_the_thresholds(tmp_path, make_shards, tiny_config):
    maps_nhw = np.zeros((2, 24, 32), np.uint8)  # at half the image's size
    maps_nhw[0, :, :8], maps_nhw[0, :, 8:16], maps_nhw[1, :, 24:] = 255, 100, 255
    index = make_shards(tmp_path / "set", 1, seed=None, classes=(1, 3), cam=Cam((1, 3), maps_nhw, 0.5))
    sample = decoded(index)
    assert cam_maps(sample).shape == (2, 48, 64) and cam_maps(sample).max() == 1.0
    seeds = tiny_config("seeds.background=0.3", "seeds.foreground=0.6").seeds
    assert seed_mask(sample, seeds)[0, [2, 24, 40, 60]].tolist() == [1, 255, 0, 3]
    found = batches(index, tiny_config("train.batch=4", "seeds.background=0.3", "seeds.foreground=0.6"), 2)
    assert {1, 255, 0, 3} == set(torch.cat([batch.seeds for batch in found]).unique().tolist())


def test_an_image_without_classes_is_background_and_needs_no_cam(tmp_path, make_shards, tiny_config):
    index = make_shards(tmp_path / "set", 1, seed=None, cam=None, classes=())
    assert not seed_mask(decoded(index), tiny_config().seeds).any()


def test_a_cam_gives_the_crops_that_its_whole_seed_mask_gives(tmp_path, make_shards, png_of, tiny_config):
    maps_nhw = np.random.default_rng(0).integers(0, 256, (2, 5, 7), np.uint8).repeat(5, 1).repeat(5, 2)
    cams = {"H": 93, "W": 130, "classes": (1, 3), "cam": Cam((1, 3), maps_nhw, 25 / 93)}
    options = tiny_config("train.batch=4", "seeds.background=0.5", "seeds.foreground=0.7")
    with_cam = make_shards(tmp_path / "cam", 4, seed=None, **cams)
    seed_HW = seed_mask(decoded(with_cam), options.seeds)
    assert set(np.unique(seed_HW)) == {0, 1, 3, 255}
    with_seed = make_shards(tmp_path / "seed", 4, seed=png_of(seed_HW), **cams)
    assert all(same(a, b) for a, b in zip(batches(with_cam, options, 4), batches(with_seed, options, 4), strict=True))


def test_neither_cam_nor_seed_is_an_error_that_says_what_to_build(tmp_path, make_shards, tiny_config):
    index = make_shards(tmp_path / "set", 2, seed=None, cam=None)
    with pytest.raises(ShardError, match="image_0: neither CAM nor seed; build the shards with --cams"):
        seed_mask(decoded(index), tiny_config().seeds)
    with pytest.raises(ShardError, match="build the shards with --cams"):
        batches(index, tiny_config(), 1)


# ------------------------------------------------------------------------------------------------------ stored samples


def test_another_class_list_is_refused(shards):
    assert open_index(str(shards.root), NAMES) == shards
    with pytest.raises(ValueError, match="its classes are 4 .* not the config's 3 .*set `classes`"):
        open_index(str(shards.root), NAMES[:3])


def test_a_missing_set_is_named():
    with pytest.raises(ShardError, match="nowhere/index.json: no such file"):
        open_index("nowhere", NAMES)


@pytest.mark.parametrize(
    "subset, numbers",
    [
        (None, range(7)),
        ("0", [0, 1, 2]),
        ("2", [6]),
        ("-1", [6]),
        ("0:2", range(6)),
        ("1:", [3, 4, 5, 6]),
        (":-1", range(6)),
        (":", range(7)),
    ],
)
def test_shards_are_selected_by_number_or_range(shards, subset, numbers):
    assert [entry.key for entry in select_shards(shards, subset)] == [f"image_{n}" for n in numbers]


@pytest.mark.parametrize("subset", ["3", "5:9", "2:1", "x", "", "1:2:3:4", "1.5"])
def test_a_selection_of_nothing_is_refused(shards, subset):
    with pytest.raises(ValueError, match=r"--shards .*has shards 0..2; write 3 for one, 0:8 for a range"):
        select_shards(shards, subset)


@pytest.mark.parametrize("workers", [0, 2])
def test_StoredSamples_come_in_order(shards, workers):
    entries = select_shards(shards, "1:")
    found = list(StoredSamples(shards, entries, workers))
    assert [sample.name for sample in found] == ["image_3", "image_4", "image_5", "image_6"]
    assert found[0].image.shape == (48, 64, 3) and found[0].image[0, 0].tolist() == [3, 3, 3]


def test_a_damaged_stored_sample_is_an_error(tmp_path: Path, make_shards):
    index = make_shards(tmp_path / "set")
    damage(index, 1)
    with pytest.raises(ShardError, match="image_1"):
        list(StoredSamples(index, index.entries, 0))
