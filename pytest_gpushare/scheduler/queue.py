"""Units: what one worker takes as a whole, a test or a group of tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from pytest_gpushare.scheduler.needs import Need
from pytest_gpushare.scheduler.types import Job

LONG_TEST = 0.1
"""From this duration on xdist's `load` commits no test beyond the next one, in seconds."""

NOTHING = 1 << 62
"""A need that fits nowhere: what is not pending."""


class Order:
    """Ranks 0, 1, 2 ... with a need each, or nothing; the first that fits is found in log n steps.

    A tree of minima: 100,000 tests with as many different needs are searched 64 workers long.
    """

    def __init__(self, needs: Sequence[int]) -> None:
        """The needs by rank, in bytes; `NOTHING` for what is not pending."""
        self._leaves = 1 << max(0, len(needs) - 1).bit_length()
        tree = [NOTHING] * (2 * self._leaves)
        tree[self._leaves : self._leaves + len(needs)] = needs
        width = self._leaves
        while width > 1:
            below = tree[width : 2 * width]
            width //= 2
            tree[width : 2 * width] = map(min, below[::2], below[1::2])
        self._tree = tree
        self._front = self._leaves
        """No leaf before this one is pending."""

    @property
    def smallest(self) -> int:
        """The smallest pending need, in bytes; `NOTHING` where none is pending."""
        return self._tree[1]

    @property
    def front(self) -> int:
        """The first pending rank; -1 where none is pending."""
        tree, leaf = self._tree, self._front
        if tree[1] == NOTHING:
            return -1
        # Those that were taken are passed once in all, and not again for each test.
        while tree[leaf] == NOTHING:
            leaf += 1
        self._front = leaf
        return leaf - self._leaves

    def take(self, rank: int) -> None:
        """Make this rank pending no more."""
        tree = self._tree
        node = self._leaves + rank
        tree[node] = NOTHING
        while node > 1:
            # The smaller one of a node and its sibling is above them.
            least, other = tree[node], tree[node ^ 1]
            node >>= 1
            if other < least:
                least = other
            if tree[node] == least:
                break
            tree[node] = least

    def first(self, most: int, start: int = 0) -> int:
        """The first rank from `start` on whose need is at most `most`; -1 where there is none."""
        tree, leaves = self._tree, self._leaves
        if most < 0 or tree[1] > most or start >= leaves:
            return -1
        # Up from the first that is pending: what fits is mostly near it, the root is far away.
        node = max(leaves + start, self._front)
        while tree[node] > most:
            # To the subtree on the right of this one.
            while node & 1:
                node >>= 1
            if not node:
                return -1
            node += 1
        while node < leaves:
            node *= 2
            if tree[node] > most:
                node += 1
        return node - leaves

    def up_to(self, most: int, start: int = 0) -> Iterator[int]:
        """The ranks from `start` on whose need is at most `most`, in order."""
        rank = self.first(most, start)
        while rank >= 0:
            yield rank
            rank = self.first(most, rank + 1)


GROUPED = ("loadscope", "loadfile", "loadgroup")
"""The values of `--dist` whose groups are never split."""

Kind = tuple[int, bool]
"""(devices, exclusive) of a unit's first test: what is searched in one tree."""
USUAL: Kind = (1, False)


def kind_of(need: Need) -> Kind:
    """That of a test which needs so much."""
    if need.devices == 1 and not need.exclusive:
        return USUAL
    return need.devices, need.exclusive


class Unit:
    """Tests that go to one worker, one after the other."""

    __slots__ = ("key", "kind", "overtaken", "rank", "since", "tests", "wants")

    def __init__(self, tests: list[int], key: str = "") -> None:
        self.tests = tests
        """Numbers of those that were not begun."""
        self.key = key
        """The group; empty for a test of its own."""
        self.rank = -1
        """The place in the order; -1: before all, as it was begun or lost already."""
        self.kind = USUAL
        """That of its first test when the order was found."""
        self.overtaken = 0
        """How many tests were admitted before it though it was its turn."""
        self.wants: dict[int, int] | None = None
        """Number of devices -> the most bytes that a test of it wants on each; found when asked."""
        self.since: float | None = None
        """When its next test was first found not to fit."""

    def next(self) -> int:
        """Its next test, taken out."""
        return self.tests.pop(0)

    def put_first(self, test: int) -> None:
        """Put a test back that was not begun."""
        self.wants = None
        self.tests.insert(0, test)


def in_units(numbers: Iterable[int], jobs: Sequence[Job]) -> list[Unit]:
    """The tests as units, in the order of their first tests."""
    units: list[Unit] = []
    by_key: dict[str, Unit] = {}
    for number in numbers:
        key = jobs[number].group
        if key and key in by_key:
            by_key[key].tests.append(number)
        else:
            by_key[key] = Unit([number], key)
            units.append(by_key[key])
    return units


def in_parts(units: Iterable[Unit], is_runnable: Callable[[Unit], bool]) -> list[Unit]:
    """The units; of one that no worker can run as a whole, its tests one by one."""
    found: list[Unit] = []
    for unit in units:
        if len(unit.tests) == 1 or is_runnable(unit):
            found.append(unit)
        else:
            found += [Unit([test]) for test in unit.tests]
    return found


class Pending:
    """Units that no worker has begun, found by what fits and in order."""

    def __init__(self, entries: Sequence[tuple[Unit, Kind, int]] = ()) -> None:
        """The units in this order, with kind and need, in bytes, of the first test of each."""
        self.units = [unit for unit, _, _ in entries]
        """By rank."""
        self.again: list[Unit] = []
        """Begun before, by workers that are gone; they come first."""
        self.count = len(entries)
        for rank, (unit, kind, _) in enumerate(entries):
            unit.rank, unit.kind = rank, kind
        self.trees = {
            kind: Order([need if of == kind else NOTHING for _, of, need in entries])
            for kind in dict.fromkeys(kind for _, kind, _ in entries)
        }

    def take(self, unit: Unit) -> None:
        """A worker begins this unit."""
        self.count -= 1
        if unit.rank >= 0:
            self.trees[unit.kind].take(unit.rank)
        else:
            self.again.remove(unit)

    def back(self, unit: Unit, *, first: bool = False) -> None:
        """A unit comes back, perhaps without the tests that were run."""
        self.count += 1
        unit.rank = -1
        self.again.insert(0 if first else len(self.again), unit)

    def front(self) -> Unit | None:
        """The unit whose turn it is."""
        if self.again:
            return self.again[0]
        fronts = [rank for tree in self.trees.values() if (rank := tree.front) >= 0]
        return self.units[min(fronts)] if fronts else None

    def all(self) -> list[Unit]:
        """Every pending unit; slow."""
        ranks = [rank for tree in self.trees.values() for rank in tree.up_to(NOTHING - 1)]
        return [*self.again, *(self.units[rank] for rank in ranks)]

    def first(self, most: Mapping[int, int], suits: Callable[[Unit], bool]) -> Unit | None:
        """The first unit that suits; `most`: by number of devices, the largest need that does."""
        for unit in self.again:
            if suits(unit):
                return unit
        first = len(self.units)
        for (devices, _), tree in self.trees.items():
            ranks = tree.up_to(most.get(devices, -1))
            first = min(first, next((r for r in ranks if suits(self.units[r])), first))
        return self.units[first] if first < len(self.units) else None


class LoadOrder:
    """The order in which xdist's `load` has its only worker run the tests, whatever ends it.

    What had been sent to a worker that died goes to the end of the queue there; so how much was
    sent is counted as `load` does.
    """

    def __init__(self, tests: Iterable[int], chunk: int | None) -> None:
        """`chunk`: `--maxschedchunk`; None: as much as it likes."""
        self._pending = list(tests)
        self._sent: list[int] = []
        self._chunk = len(self._pending) if chunk is None else chunk
        self._send(max(2, min(len(self._pending) // 4, self._chunk)))

    def _send(self, count: int) -> None:
        self._sent += self._pending[:count]
        del self._pending[:count]

    def _fill(self, duration: float) -> None:
        least, most = (max(2, len(self._pending) // part) for part in (4, 2))
        has = len(self._sent)
        if has < least and not (duration >= LONG_TEST and has >= 2):
            self._send(min(most - has, max(2 - has, self._chunk)))

    def done(self, test: int, duration: float) -> None:
        """A test is over."""
        if test in self._sent:
            self._sent.remove(test)
            self._fill(duration)

    def down(self, running: int | None) -> Mapping[int, int]:
        """The worker died in this test. Returns the place of each test that is left."""
        self._pending += [test for test in self._sent if test != running]
        self._sent.clear()
        return {test: place for place, test in enumerate(self._pending)}

    def again(self, test: int) -> None:
        """A test that is over is to be run once more."""
        self._pending.insert(0, test)

    def up(self) -> None:
        """Another worker takes its place."""
        self._fill(0.0)
