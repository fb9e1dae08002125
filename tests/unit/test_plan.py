"""The order of samples: every one once an epoch, the same for any number of ranks and workers, resumable anywhere."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weakclip.data.plan import Plan, epoch_order, generator, micro_batches

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any).map(tuple)
RANKS, WORKERS, BATCH = st.integers(1, 8), st.integers(1, 4), st.integers(1, 5)
MANY = settings(max_examples=60, deadline=None)


def global_batches(consumed: int, batch: int, ranks: int, workers: int, count: int) -> list[list[int]]:
    """The positions of `count` micro-steps of all ranks, workers asked in turn as a DataLoader does."""
    loaders = [[micro_batches(consumed, batch, ranks, rank, workers, w) for w in range(workers)] for rank in range(ranks)]
    return [
        [position for of_rank in loaders for position in next(of_rank[step % workers])]  # in the order of ranks
        for step in range(count)
    ]


@MANY
@given(SIZES, st.integers(0, 5), st.integers(0, 3), st.integers(1, 4))
def test_every_sample_comes_exactly_once_an_epoch(sizes, seed, epoch, window):
    plan, total = Plan(sizes, seed, window), sum(sizes)
    drawn = [plan.sample(position) for position in range(epoch * total, (epoch + 1) * total)]
    assert {of for of, _ in drawn} == {epoch}
    assert sorted(sample for _, sample in drawn) == list(range(total))


@MANY
@given(BATCH, RANKS, WORKERS, st.integers(0, 1000))
def test_global_batches_are_consecutive_positions_whatever_the_ranks_and_workers(batch, ranks, workers, consumed):
    size = batch * ranks
    want = [list(range(consumed + step * size, consumed + (step + 1) * size)) for step in range(9)]
    assert global_batches(consumed, batch, ranks, workers, 9) == want == global_batches(consumed, size, 1, 1, 9)


@MANY
@given(SIZES, BATCH, RANKS, WORKERS, st.integers(0, 6), st.integers(1, 4))
def test_resuming_after_any_step_gives_what_would_have_come(sizes, batch, ranks, workers, done, other_workers):
    plan = Plan(sizes, 1, 3)
    whole = global_batches(0, batch, ranks, workers, 10)
    resumed = global_batches(done * batch * ranks, batch, ranks, other_workers, 10 - done)
    assert [[plan.sample(p) for p in part] for part in whole[done:]] == [[plan.sample(p) for p in part] for part in resumed]


@MANY
@given(SIZES, st.integers(0, 60))
def test_successors_start_at_the_position_and_go_once_around_its_epoch(sizes, position):
    plan, total = Plan(sizes, 2, 2), sum(sizes)
    found = list(plan.successors(position))
    assert found[0] == plan.sample(position) and len(found) == total
    assert sorted(sample for _, sample in found) == list(range(total))
    assert {epoch for epoch, _ in found} == {position // total}
    if (position + 1) % total:
        assert found[1 % total] == plan.sample(position + 1)


@pytest.mark.parametrize("window", [1, 2, 100])
def test_samples_are_shuffled_within_groups_of_window_shards_alone(window):
    sizes = (10,) * 6
    shards = epoch_order(sizes, 0, 0, window) // 10
    for first in range(0, 60, 10 * window):
        assert len(set(shards[first : first + 10 * window])) == min(window, 6)
    assert list(shards[:10]) != sorted(shards[:10]) or window == 1


def test_order_changes_with_epoch_and_seed_and_only_with_them():
    sizes = (20, 0, 7, 30)
    orders = [epoch_order(sizes, seed, epoch, 2) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    epoch_order.cache_clear()
    assert np.array_equal(epoch_order(sizes, 0, 0, 2), orders[0])


def test_a_plan_without_samples_is_refused():
    with pytest.raises(ValueError, match="no sample"):
        Plan((0, 0), 0, 1)


def test_a_generator_depends_on_its_whole_key_alone():
    assert generator(1, 2, 3).random() == generator(1, 2, 3).random()
    assert len({generator(*key).random() for key in [(1, 2, 3), (1, 3, 2), (1, 2), (0, 2, 3), (1, 2, 4)]}) == 5


def test_a_run_that_never_ends_wraps_from_epoch_to_epoch():
    plan = Plan((2, 1), 0, 1)
    positions = [p for part in islice(micro_batches(0, 2, 1, 0), 3) for p in part]
    assert [plan.sample(p)[0] for p in positions] == [0, 0, 0, 1, 1, 1]
