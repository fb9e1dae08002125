"""The order of samples: each one once per epoch, the same for any number of ranks and workers, resumable anywhere."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weakclip.data.plan import AUGMENT, MIX, SHARDS, Mix, Order, generator, micro_batches

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(any)
RANKS, WORKERS, BATCH = st.integers(1, 16), st.integers(0, 4), st.integers(1, 32)
WINDOW = st.integers(1, 10)
MANY = settings(max_examples=80, deadline=None)


def global_batches(consumed: int, batch: int, ranks: int, workers: int, count: int) -> list[list[int]]:
    """The positions of `count` micro-steps of all ranks, workers asked in turn as a DataLoader does; 0: the process itself."""
    workers = max(workers, 1)
    loaders = [[micro_batches(consumed, batch, ranks, rank, workers, w) for w in range(workers)] for rank in range(ranks)]
    return [
        [position for of_rank in loaders for position in next(of_rank[step % workers])]  # in the order of ranks
        for step in range(count)
    ]


# ------------------------------------------------------------------------------------------------------ one set of shards


@MANY
@given(SIZES, st.integers(0, 5), st.integers(0, 3), WINDOW)
def test_every_sample_comes_exactly_once_an_epoch(sizes, seed, epoch, window):
    order, total = Order(sizes, (seed, 0), window), sum(sizes)
    drawn = [order.sample(position) for position in range(epoch * total, (epoch + 1) * total)]
    assert {of for of, _ in drawn} == {epoch}
    assert sorted(sample for _, sample in drawn) == list(range(total))


@MANY
@given(SIZES, BATCH, RANKS, WORKERS, st.integers(0, 4), WINDOW)
def test_whole_epochs_hold_every_sample_once_whatever_the_ranks_workers_and_batch(sizes, batch, ranks, workers, resume, window):
    """Dealt to all loaders of all ranks, from any resume point on: nothing is dropped, doubled or late, and nobody waits."""
    order, total, size = Order(sizes, (1, 0), window), sum(sizes), batch * ranks
    steps = 2 * total // size + 2
    drawn = [order.sample(p) for part in global_batches(resume * size, batch, ranks, workers, steps) for p in part]
    counts = Counter(drawn)
    assert max(counts.values()) == 1
    whole = [e for e in range(resume * size // total + 1, (resume + steps) * size // total)]
    assert whole and all(sum(epoch == e for epoch, _ in drawn) == total for e in whole)


@MANY
@given(BATCH, RANKS, WORKERS, st.integers(0, 1000))
def test_global_batches_are_consecutive_positions_whatever_the_ranks_and_workers(batch, ranks, workers, consumed):
    size = batch * ranks
    want = [list(range(consumed + step * size, consumed + (step + 1) * size)) for step in range(9)]
    assert global_batches(consumed, batch, ranks, workers, 9) == want == global_batches(consumed, size, 1, 1, 9)


@MANY
@given(SIZES, st.sampled_from([(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]), WORKERS, WORKERS, st.integers(0, 6), WINDOW)
def test_a_run_resumed_on_other_ranks_and_workers_gives_what_would_have_come(sizes, split, workers, other_workers, done, window):
    order = Order(sizes, (1, 0), window)
    batch, ranks = split  # 12 samples per global batch
    whole = global_batches(0, 12, 1, workers, 10)
    resumed = global_batches(done * 12, batch, ranks, other_workers, 10 - done)
    fresh = Order(sizes, (1, 0), window)  # another process with the same state
    assert [[order.sample(p) for p in part] for part in whole[done:]] == [[fresh.sample(p) for p in part] for part in resumed]


@MANY
@given(SIZES, st.integers(0, 60), WINDOW)
def test_successors_start_at_the_position_and_go_once_around_its_epoch(sizes, position, window):
    order, total = Order(sizes, (2, 0), window), sum(sizes)
    found = list(order.successors(position))
    assert found[0] == order.sample(position) and len(found) == total
    assert sorted(sample for _, sample in found) == list(range(total))
    assert {epoch for epoch, _ in found} == {position // total}
    if (position + 1) % total:
        assert found[1 % total] == order.sample(position + 1)


@pytest.mark.parametrize("window", [1, 2, 4, 100])
def test_samples_are_shuffled_within_windows_of_shards_alone(window):
    order = Order([10] * 6, (0, 0), window)
    shards = [order.sample(position)[1] // 10 for position in range(60)]
    for first in range(0, 60, 10 * window):
        assert len(set(shards[first : first + 10 * window])) == min(window, 6 - first // 10)
    assert shards[:10] != sorted(shards[:10]) or window == 1


@MANY
@given(SIZES, st.integers(0, 200), WINDOW)
def test_a_position_lies_in_its_window_and_the_following_one_begins_where_it_ends(sizes, position, window):
    order, total = Order(sizes, (3, 0), window), sum(sizes)
    found = order.window_at(position)
    starts = np.cumsum([0, *sizes])
    assert order.sample(position)[1] in found.samples
    assert sorted(found.samples) == sorted(n for s in found.shards for n in range(starts[s], starts[s + 1]))
    following = order.following(found, position)
    assert following.first == (found.first + len(found.samples)) % total and len(following.samples)


def test_order_changes_with_epoch_seed_and_set_and_only_with_them():
    def drawn(*key: int, epoch: int = 0) -> tuple[tuple[int, int], ...]:
        order = Order([20, 0, 7, 30], key, 2)
        return tuple(order.sample(57 * epoch + place)[1] for place in range(57))

    assert len({drawn(0, 0), drawn(1, 0), drawn(0, 1), drawn(0, 0, epoch=1)}) == 4
    assert drawn(0, 0) == drawn(0, 0)


def test_a_plan_without_samples_is_refused():
    with pytest.raises(ValueError, match="no sample"):
        Order([0, 0], (0, 0), 1)


def test_a_generator_depends_on_its_whole_key_alone():
    assert generator(AUGMENT, 2, 3).random() == generator(AUGMENT, 2, 3).random()
    keys = [(AUGMENT, 2, 3), (AUGMENT, 3, 2), (SHARDS, 2, 3), (MIX, 2, 3), (AUGMENT, 2, 4)]
    assert len({generator(*key).random() for key in keys}) == 5


# ---------------------------------------------------------------------------------------------------------- several sets


@MANY
@given(st.lists(st.floats(0.05, 10), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 5000))  # 0.05 / 40 > 0.001
def test_each_source_of_a_mix_runs_through_its_own_positions_without_gap(weights, seed, start):
    mix, fresh = Mix(weights, seed), Mix(weights, seed)
    seen: dict[int, list[int]] = {}
    for position in range(start, start + 2500):
        source, place = mix.at(position)
        seen.setdefault(source, []).append(place)
    for places in seen.values():
        assert places == list(range(places[0], places[0] + len(places)))
    assert fresh.at(start + 2499) == mix.at(start + 2499)  # a resumed run needs no earlier state


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [2, 1], [1, 0.5, 0.25], [999, 1]])
def test_sources_come_by_their_weights_in_every_block(weights):
    mix = Mix(weights, 0)
    counts = Counter(mix.at(position)[0] for position in range(3 * Mix.BLOCK))
    for source, weight in enumerate(weights):
        assert abs(counts[source] / (3 * Mix.BLOCK) - weight / sum(weights)) < 1 / Mix.BLOCK


def test_sources_are_shuffled_anew_in_each_block():
    mix = Mix([1, 1], 0)
    first, second = ([mix.at(block * Mix.BLOCK + place)[0] for place in range(Mix.BLOCK)] for block in (0, 1))
    assert first != second and first != sorted(first)


# ------------------------------------------------------------------------------------------------- a very large training


@pytest.fixture(scope="module")
def large() -> list[int]:
    """14.2 million samples in 10,000 uneven shards: the size of ImageNet-22k."""
    return np.random.default_rng(0).integers(1000, 1840, 10_000).tolist()


RANKS_LARGE, WORKERS_LARGE, BATCH_LARGE = 1024, 8, 4
SIZE_LARGE = RANKS_LARGE * BATCH_LARGE


def test_planning_for_1024_ranks_takes_little_time_and_memory(large, capsys):
    """Prints what `pytest -s` shows; time is not asserted, memory is."""
    tracemalloc.start()
    order = Order(large, (0, 0), 8)
    times = []
    for consumed in (0, 30_000 * SIZE_LARGE, 30_001 * SIZE_LARGE + 7, 14_195_627):  # any position in any epoch
        begun = time.perf_counter()
        positions = micro_batches(consumed, BATCH_LARGE, RANKS_LARGE, 1023, WORKERS_LARGE, 5)
        drawn = [order.sample(position) for part in islice(positions, 20) for position in part]
        times.append(time.perf_counter() - begun)
        assert len(drawn) == 20 * BATCH_LARGE
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with capsys.disabled():
        print(f"\nplanning 20 micro-batches anywhere: {max(times) * 1e3:.1f} ms at most, {peak / 1e6:.1f} MB")
    assert peak < 200e6


def test_1024_ranks_of_8_workers_share_out_an_epoch_exactly(large):
    """All positions of all 8,192 loaders over one epoch's first and last steps, and the epoch's windows as a whole."""
    order, total = Order(large, (0, 0), 8), sum(large)
    for first_step in (0, total // SIZE_LARGE - 8):  # the last ones reach into the next epoch
        dealt = global_batches(first_step * SIZE_LARGE, BATCH_LARGE, RANKS_LARGE, WORKERS_LARGE, 9)
        flat = [position for part in dealt for position in part]
        assert flat == list(range(first_step * SIZE_LARGE, (first_step + 9) * SIZE_LARGE))
        drawn = [order.sample(position) for position in flat]
        assert len(set(drawn)) == len(drawn)
    seen = np.zeros(total, bool)
    place = 0
    while place < total:
        window = order.window_at(place)
        assert window.first == place and not seen[window.samples].any()
        seen[window.samples] = True
        place += len(window.samples)
    assert seen.all()
