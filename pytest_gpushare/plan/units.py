"""Units: what one worker takes as a whole, a test or a group of tests."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from pytest_gpushare.plan.order import Order
from pytest_gpushare.plan.work import Job

GROUPED = ("loadscope", "loadfile", "loadgroup")
"""The values of `--dist` whose groups are never split."""

Kind = tuple[int, bool]
"""(devices, exclusive) of a unit's first test: what is searched in one tree."""


@dataclass(eq=False)
class Unit:
    """Tests that go to one worker, one after the other."""

    tests: deque[int]
    key: str = ""
    """The group; empty for a test of its own."""
    rank: int = -1
    """The place in the order; -1: before all, as it was begun or lost already."""
    alone: bool = False
    """Whether its test runs alone on its devices though its need does not say so."""
    claims: bool = False
    """Whether it has a claim on its devices."""
    overtaken: int = 0
    """How many tests were admitted before it though it was its turn."""
    wants: dict[int, int] | None = None
    """Number of devices -> the most bytes that a test of it wants on each; found when asked."""
    since: float | None = None
    """When its next test was first found not to fit."""


def in_units(numbers: Iterable[int], jobs: Sequence[Job]) -> list[Unit]:
    """The tests as units, in the order of their first tests."""
    units: list[Unit] = []
    by_key: dict[str, Unit] = {}
    for number in numbers:
        key = jobs[number].group
        if not key:
            units.append(Unit(deque((number,))))
        elif key in by_key:
            by_key[key].tests.append(number)
        else:
            by_key[key] = Unit(deque((number,)), key)
            units.append(by_key[key])
    return units


@dataclass
class Pending:
    """Units that no worker has begun, found by what fits and in order."""

    units: list[Unit] = field(default_factory=list)
    """By rank."""
    trees: dict[Kind, Order] = field(default_factory=dict)
    again: list[Unit] = field(default_factory=list)
    """Begun before, by workers that are gone; they come first."""
    last: list[Unit] = field(default_factory=list)
    """What runs alone after all others."""
    count: int = 0

    @classmethod
    def ordered(
        cls, units: Sequence[Unit], kind: Callable[[int], Kind], need: Callable[[int], int]
    ) -> Pending:
        """The units in this order; `kind` and `need` tell of a test by its number."""
        pairs: dict[Kind, list[tuple[int, int]]] = {}
        for rank, unit in enumerate(units):
            unit.rank = rank
            head = unit.tests[0]
            pairs.setdefault(kind(head), []).append((rank, need(head)))
        trees = {key: Order(len(units), found) for key, found in pairs.items()}
        return cls(list(units), trees, count=len(units))

    def take(self, unit: Unit, kind: Kind) -> None:
        """A worker begins this unit."""
        self.count -= 1
        if unit in self.again:
            self.again.remove(unit)
        elif unit in self.last:
            self.last.remove(unit)
        else:
            self.trees[kind].take(unit.rank)

    def back(self, unit: Unit) -> None:
        """A unit comes back, perhaps without the tests that were run."""
        self.count += 1
        unit.rank = -1
        (self.last if unit.alone else self.again).append(unit)

    def front(self) -> Unit | None:
        """The unit whose turn it is."""
        if self.again:
            return self.again[0]
        ranks = [rank for tree in self.trees.values() if (rank := tree.first(1 << 61)) >= 0]
        if ranks:
            return self.units[min(ranks)]
        return self.last[0] if self.last else None

    def all(self) -> list[Unit]:
        """Every pending unit; slow."""
        found = list(self.again)
        for tree in self.trees.values():
            rank = tree.first(1 << 61)
            while rank >= 0:
                found.append(self.units[rank])
                rank = tree.first(1 << 61, rank + 1)
        return [*found, *self.last]
