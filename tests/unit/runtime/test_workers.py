"""Work in threads."""

from __future__ import annotations

import threading

import pytest
import torch

from weakclip.runtime.workers import map_in_threads


def square(number: int) -> int:
    if number < 0:
        raise OSError(28, "No space left on device", f"{number}.png")
    return number * number


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_give_results_in_order_and_errors_as_they_are(threads):
    assert [*map_in_threads(square, threads, range(9))] == [n * n for n in range(9)]
    done = []
    with pytest.raises(OSError, match="No space left on device: '-1.png'"):
        for result in map_in_threads(square, threads, [1, -1, 2]):
            done.append(result)
    assert done == [1]


def test_what_threads_do_is_done_side_by_side_and_not_far_ahead():
    both, made = threading.Barrier(2, timeout=20), []
    results = map_in_threads(lambda n: both.wait() if n < 2 else n, 2, (made.append(n) or n for n in range(100)))
    assert next(results) in (0, 1) and len(made) <= 5
    results.close()


def test_each_of_several_threads_has_one_core_for_torch():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert [*map_in_threads(lambda _: torch.get_num_threads(), 2, range(4))] == [1] * 4
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
