"""Samples of one device over a run of any length, in bounded memory.

When the rows are many, older ones are thinned: of each stretch of time the row with the most
VRAM in use stays, and so does every row that holds the peak of a column. So a picture of the
run keeps its shape, and its peaks are exact.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

MOST_ROWS = 20_000
"""An hour at 5 Hz in full; a day with a row every five seconds or so. 8 bytes a figure."""

RECENT_ROWS = 3_000
"""The newest rows, which are never thinned: ten minutes."""

_UNKNOWN = -1
"""Stands for None in the arrays."""


class Parts(NamedTuple):
    """Who holds the VRAM that is in use, in bytes; None where nobody can tell."""

    ollama: int | None = None
    others: int | None = None
    workers: Mapping[str, int] | None = None
    """By worker's id; a worker that holds nothing may be left out."""


class Series:
    """The rows of one device: when, how much is in use, and by whom."""

    def __init__(self, most: int = MOST_ROWS, recent: int = RECENT_ROWS) -> None:
        self._most, self._recent = most, recent
        self._gap = 0.25
        self.at = array("d")
        self.used = array("q")
        self._ollama = array("q")
        self._others = array("q")
        self._workers: dict[str, array[int]] = {}

    def __len__(self) -> int:
        return len(self.at)

    def add(self, at: float, used: int, parts: Parts) -> None:
        """Append a row; `at` in seconds since the run started, later than the last."""
        if len(self.at) >= self._most:
            self._thin()
        for worker in parts.workers or ():
            if worker not in self._workers:
                # Before its first figure nothing was known of it.
                self._workers[worker] = array("q", [_UNKNOWN]) * len(self.at)
        self.at.append(at)
        self.used.append(used)
        self._ollama.append(_UNKNOWN if parts.ollama is None else parts.ollama)
        self._others.append(_UNKNOWN if parts.others is None else parts.others)
        for worker, column in self._workers.items():
            column.append(_UNKNOWN if parts.workers is None else parts.workers.get(worker, 0))

    def ollama(self) -> list[int | None]:
        """Bytes that Ollama held, row by row."""
        return _told(self._ollama)

    def others(self) -> list[int | None]:
        """Bytes that neither Ollama nor a worker held, row by row."""
        return _told(self._others)

    def workers(self) -> dict[str, list[int | None]]:
        """Worker's id -> the bytes that it and its descendants held, row by row."""
        return {worker: _told(column) for worker, column in self._workers.items()}

    def heights(self, columns: int) -> list[int]:
        """The most bytes in use in each of so many equal stretches of time; gaps are filled."""
        if not self.at or columns < 1:
            return []
        begun = self.at[0]
        length = max(self.at[-1] - begun, 1e-9) / columns
        heights: list[int] = [_UNKNOWN] * columns
        for at, used in zip(self.at, self.used, strict=True):
            column = min(columns - 1, int((at - begun) / length))
            heights[column] = max(heights[column], used)
        last = self.used[0]
        for column, height in enumerate(heights):
            last = heights[column] = last if height == _UNKNOWN else height
        return heights

    def _thin(self) -> None:
        old = max(0, len(self.at) - self._recent)
        peaks = {_highest(column) for column in self._columns()}
        kept = self._spaced(old) | peaks
        # Not by one row each time: the next thinning is to be far away.
        while len(kept) > max(len(peaks), (self._most - self._recent) // 2):
            if self._gap > 1e9:
                break
            self._gap *= 2
            kept = self._spaced(old) | peaks
        rows = sorted({row for row in kept if row < old}) + list(range(old, len(self.at)))
        self.at = array("d", [self.at[row] for row in rows])
        self.used, self._ollama, self._others = (
            _picked(column, rows) for column in (self.used, self._ollama, self._others)
        )
        self._workers = {w: _picked(column, rows) for w, column in self._workers.items()}

    def _spaced(self, old: int) -> set[int]:
        """Of the first `old` rows the highest of each stretch of `_gap` seconds."""
        kept: dict[int, int] = {}
        for row in range(old):
            stretch = int(self.at[row] / self._gap)
            best = kept.get(stretch)
            if best is None or self.used[row] > self.used[best]:
                kept[stretch] = row
        return set(kept.values())

    def _columns(self) -> Iterator[array[int]]:
        yield self.used
        yield self._ollama
        yield self._others
        yield from self._workers.values()


def _told(column: Sequence[int]) -> list[int | None]:
    return [None if value == _UNKNOWN else value for value in column]


def _picked(column: array[int], rows: Sequence[int]) -> array[int]:
    return array("q", [column[row] for row in rows])


def _highest(column: array[int]) -> int:
    return max(range(len(column)), key=column.__getitem__)
