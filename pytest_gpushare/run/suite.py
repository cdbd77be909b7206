"""What the workers collected: the tests of the run, and who has which of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pytest_gpushare.run.told import Told

UNKNOWN = -1
"""The number of a test that is not in the run's list."""


class Collection(NamedTuple):
    """What one worker collected, and where in the run's list its tests stand."""

    ids: Sequence[str]
    numbers: Sequence[int]
    """Its index -> the test's number; the same object for workers that collected the same."""
    indices: Mapping[int, int] | None
    """The test's number -> its index; None where the two are equal."""

    def place(self, number: int) -> int:
        """The worker's index of the test of this number."""
        return number if self.indices is None else self.indices[number]


class Suite:
    """The union of what the workers collected; a test's number is its place in it."""

    def __init__(self) -> None:
        self.nodeids: list[str] = []
        self._numbers: dict[tuple[str, int], int] = {}
        self._known: list[tuple[Sequence[str], Collection]] = []
        self.is_closed = False
        """Whether the run has begun: what only a later worker collects is not run any more."""

    def add(self, ids: Sequence[str]) -> Collection:
        """Take a worker's tests in; those that no other has come at the end."""
        for before, collection in self._known:
            if before == ids:
                return collection
        numbers, seen = [], dict[str, int]()
        for nodeid in ids:
            # A test that is named twice on the command line may be collected twice.
            turn = seen[nodeid] = seen.get(nodeid, -1) + 1
            new = UNKNOWN if self.is_closed else len(self.nodeids)
            number = self._numbers.setdefault((nodeid, turn), new)
            if number == len(self.nodeids):
                self.nodeids.append(nodeid)
            numbers.append(number)
        same = numbers == list(range(len(numbers)))
        indices = None if same else {number: index for index, number in enumerate(numbers)}
        if indices is not None:
            indices.pop(UNKNOWN, None)
        collection = Collection(ids, numbers, indices)
        self._known.append((ids, collection))
        return collection

    def number(self, nodeid: str) -> int | None:
        """The test of this node id."""
        return self._numbers.get((nodeid, 0))


class Crew:
    """The workers of the start by kind, with what each collected and told."""

    def __init__(self) -> None:
        self.on_gpu: list[tuple[Collection, Told]] = []
        self.on_cpu: list[tuple[Collection, Told]] = []

    def add(self, has_gpu: bool, collection: Collection, told: Told) -> None:
        """A worker has collected."""
        (self.on_gpu if has_gpu else self.on_cpu).append((collection, told))
