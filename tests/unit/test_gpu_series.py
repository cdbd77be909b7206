"""Samples of days in bounded memory, with exact peaks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pytest_gpushare.gpu.attribution import DeviceUsage
from pytest_gpushare.gpu.readings import Series

GB = 1024**3


def usage(used: int, workers: dict[str, int] | None = None, unattributed: int = 0) -> DeviceUsage:
    """The usage of a device; where workers are known, Ollama holds 1 byte."""
    neighbours = {} if workers is None else {"Ollama": 1}
    return DeviceUsage(1000, used, 1000 - used, neighbours, workers, unattributed)


def test_rows_are_kept_as_they_came() -> None:
    series = Series()
    series.add(0.2, usage(5))
    series.add(0.4, usage(7, {"gw0": 3}, unattributed=1))
    series.add(0.6, usage(3, {}))
    assert list(series.at) == [0.2, 0.4, 0.6]
    assert list(series.used) == [5, 7, 3]
    assert series.neighbour("Ollama") == [None, 1, 1]
    assert series.neighbour("another") == [None, 0, 0]
    assert series.others() == [None, 2, 2]
    # Before its first figure nothing was known of it; after that a worker left out holds nothing.
    assert series.workers() == {"gw0": [None, 3, 0]}


@given(
    st.lists(st.integers(0, 100), min_size=1, max_size=400),
    st.integers(20, 60),
)
def test_thinned_rows_keep_shape_and_peaks(used: list[int], most: int) -> None:
    """However many rows: never more than `most`, in order, the newest in full, each peak kept."""
    recent = most // 4
    series = Series(most, recent)
    rows = [(n * 0.2, size, {"gw0": size // 2, "gw1": 100 - size}) for n, size in enumerate(used)]
    for at, size, workers in rows:
        series.add(at, usage(size, workers))
        assert len(series) <= most
    told = list(zip(series.at, series.used, *series.workers().values(), strict=True))
    assert told == [
        row for row in ((at, size, *held.values()) for at, size, held in rows) if row in told
    ]
    assert [row[0] for row in told[-recent:]] == [at for at, _, _ in rows[-recent:]]
    assert max(series.used) == max(used)
    assert max(series.workers()["gw0"]) == max(used) // 2
    assert max(series.workers()["gw1"]) == 100 - min(used)


def test_a_day_is_covered_evenly() -> None:
    """24 hours at 5 Hz: no stretch of the day is lost, and the rows are few."""
    series = Series()
    for n in range(24 * 3600 * 5):
        series.add(n * 0.2, usage(n % 7))
    assert len(series) <= 20_000
    gaps = [later - earlier for earlier, later in zip(series.at, series.at[1:], strict=False)]
    assert max(gaps) < 40


def test_heights() -> None:
    series = Series()
    assert series.heights(4) == []
    for at, size in ((0.0, 1), (0.2, 5), (9.8, 3), (10.0, 2)):
        series.add(at, usage(size))
    # A stretch without a row is as high as the one before it.
    assert series.heights(4) == [5, 5, 5, 3]


def test_more_peaks_than_rows_to_keep() -> None:
    """Each column's peak stays, also where there are so many that little can be dropped."""
    series = Series(12, 4)
    for row in range(40):
        series.add(row, usage(row % 7, {f"gw{row % 10}": 100 + row}))
    # The newest four, and a peak of each of the 14 columns.
    assert len(series) <= 4 + 14
    for worker, column in series.workers().items():
        assert max(size or 0 for size in column) == 130 + int(worker[2:])
