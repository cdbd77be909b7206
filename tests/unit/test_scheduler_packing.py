"""The order, and the search for what fits."""

from __future__ import annotations

import random
import statistics

from dispatching import makespan_by_bound
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpushare.scheduler.packing import STEPS, Bin, best_order, lower_bound
from pytest_gpushare.scheduler.queue import NOTHING, Order
from pytest_gpushare.units import GB

WORKLOAD = [
    (4, 1.91), (6, 1.37), (1, 1.68), (1, 0.86), (1, 1.84), (2, 0.27), (6, 0.95), (2, 0.36),
    (6, 0.31), (1, 1.91), (1, 1.24), (6, 0.29), (2, 0.28), (2, 0.72), (2, 1.17), (3, 1.21),
    (2, 0.39), (2, 0.87), (12, 1.48), (1, 1.31), (8, 1.42), (6, 1.6), (8, 1.25), (8, 0.85),
    (2, 1.63), (2, 0.35), (3, 1.15), (4, 1.51), (3, 1.3), (1, 0.41), (6, 0.5), (4, 0.47),
    (8, 0.96), (1, 1.58), (4, 0.81), (4, 1.27), (8, 0.32), (1, 1.9), (8, 1.45), (1, 0.31),
]  # fmt: skip
"""40 tests: GB and seconds."""


@given(
    st.lists(st.none() | st.integers(0, 40), max_size=40), st.integers(-2, 45), st.integers(0, 45)
)
def test_the_first_that_fits(needs: list[int | None], most: int, start: int) -> None:
    """As a plain search finds it, after any taking."""
    order = Order([rank % 7 if need is None else need for rank, need in enumerate(needs)])
    for rank, need in enumerate(needs):
        if need is None:
            order.take(rank)
            if rank % 3 == 0:
                pending = [r for r in range(len(needs)) if r > rank or needs[r] is not None]
                assert order.front == min(pending, default=-1)
    expected = next(
        (r for r, need in enumerate(needs) if r >= start and need is not None and need <= most), -1
    )
    assert order.first(most, start) == expected
    assert order.smallest == min((n for n in needs if n is not None), default=NOTHING)


def test_lower_bound() -> None:
    """The largest of area, workers and the longest test."""
    assert lower_bound([6, 6], [2.0, 2.0], [Bin(12, 8)]) == 2.0
    assert lower_bound([12, 12], [2.0, 2.0], [Bin(12, 8)]) == 4.0
    assert lower_bound([1] * 4, [1.0] * 4, [Bin(12, 1)]) == 4.0
    needs, times = zip(*WORKLOAD, strict=True)
    assert round(lower_bound(needs, times, [Bin(24, 8)]), 2) == 6.58


def test_the_order_is_the_same_each_time() -> None:
    """No clock and no seed decides."""
    needs, times = [size * GB for size, _ in WORKLOAD], [seconds for _, seconds in WORKLOAD]
    orders = [best_order(needs, times, [Bin(24 * GB, 8)]) for _ in range(2)]
    assert orders[0] == orders[1]
    assert sorted(orders[0] or []) == list(range(40))


def test_too_few_durations() -> None:
    """With half of them known the median stands for the rest; with fewer there is no order."""
    assert best_order([GB] * 2, [1.0, None], [Bin(4 * GB, 2)]) is not None
    assert best_order([GB] * 3, [1.0, None, None], [Bin(4 * GB, 2)]) is None
    assert best_order([], [], [Bin(4 * GB, 2)]) is None
    assert best_order([GB], [1.0], []) is None


def test_more_tests_than_steps() -> None:
    """Then one order is taken untried."""
    needs = [(1 + n % 7) * GB for n in range(STEPS + 1)]
    order = best_order(needs, [1.0 + n % 3 for n in range(STEPS + 1)], [Bin(24 * GB, 8)])
    assert order is not None
    assert sorted(order) == list(range(STEPS + 1))


def test_contexts_count_in_the_simulation() -> None:
    """A test that fits alone, but not beside contexts, ends the simulation all the same."""
    needs = [10 * GB, 2 * GB, 2 * GB]
    order = best_order(needs, [1.0] * 3, [Bin(10 * GB, 3, GB)])
    assert order is not None
    assert sorted(order) == [0, 1, 2]


def test_makespan_of_the_workload() -> None:
    """Within 1.05 of the bound with known durations, within 1.20 without."""
    assert makespan_by_bound(WORKLOAD, known=True) <= 1.05
    assert makespan_by_bound(WORKLOAD, known=False) <= 1.20


def test_makespan_of_random_workloads() -> None:
    """The same for the median of ten like it."""
    draw = random.Random(3)
    sizes = [size for size, _ in WORKLOAD]
    suites = [
        [(draw.choice(sizes), draw.uniform(0.25, 1.95)) for _ in range(40)] for _ in range(10)
    ]
    assert statistics.median(makespan_by_bound(suite, known=True) for suite in suites) <= 1.05
    assert statistics.median(makespan_by_bound(suite, known=False) for suite in suites) <= 1.20
