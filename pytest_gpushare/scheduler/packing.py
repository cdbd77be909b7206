"""The order in which tests start: many are tried in simulation, the best is followed.

The simulation is that of the dispatcher: whenever a worker is free, the first test in the
order that fits starts. Deterministic, and bounded by a number of steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from pytest_gpushare.scheduler.gpu_pool import GpuPool
from pytest_gpushare.scheduler.needs import Need
from pytest_gpushare.scheduler.queue import GROUPED, Pending, Unit, in_parts, in_units, kind_of
from pytest_gpushare.scheduler.types import Job

STEPS = 60_000
"""Starts of tests that are simulated at most: about 100 ms on two slow cores."""

MOST_TRIES = 1_000
FINALISTS = 10
"""The best orders, of which the one is taken that bears small changes of durations best."""
SAMPLES = 10

LEVELS = 24
"""Different needs in the simulation; more are rounded up."""

EXPONENTS = (0.5, 0.3, 1.0, 0.0)


class Bin(NamedTuple):
    """A device with its workers."""

    budget: int
    """Bytes."""
    workers: int
    context: int = 0
    """What an idle worker holds that has run a test, in bytes."""


def ordered(tests: Sequence[int], gpu: GpuPool, *, alone: bool = False) -> Pending:
    """The GPU tests in the order to start them; how it is to be followed is noted in the pool.

    `alone`: one worker runs all tests of the run, in stock xdist's order, as no other order
    would pack better: that of collection, or of groups the largest first. Else, with known
    durations, the best order found in simulation; else the largest needs first. What does not
    fit beside the contexts of its device's other workers comes first of all: then they have
    none yet, and need not be ended for its sake.
    """
    jobs, grouped = gpu.jobs, gpu.policy.dist in GROUPED
    if alone and not grouped:
        units = [Unit([test]) for test in tests]
    else:
        units = in_parts(in_units(tests, jobs), gpu.any_worker_can_run)
    bins = _bins(gpu)
    largest = max((b.budget for b in bins), default=0)
    widest = max((b.budget - (b.workers - 1) * b.context for b in bins), default=0)
    slots = _slots(gpu)
    gpu.is_exact = all(
        min(worker.slot, most) == slots[count]
        for worker in gpu.workers.values()
        for count, most in worker.most.items()
    )
    heads = [gpu.need(unit.tests[0]) for unit in units]
    kinds = [kind_of(head) for head in heads]

    def size_of(need: Need) -> int:
        return slots[need.devices] if need.vram is None else need.vram

    def whole_size(unit: Unit) -> int:
        """The largest need of a unit's tests, in bytes; that of a test alone is the device."""
        needs = [gpu.need(test) for test in unit.tests]
        return max(largest if need.exclusive else size_of(need) for need in needs)

    needs = [size_of(head) for head in heads]

    def pending(order: Sequence[int]) -> Pending:
        return Pending([(units[at], kinds[at], needs[at]) for at in order])

    if grouped and alone and gpu.policy.reorder:
        return pending(sorted(range(len(units)), key=lambda at: -len(units[at].tests)))
    if alone or (grouped and not gpu.policy.reorder):
        return pending(range(len(units)))
    sizes = [whole_size(unit) for unit in units]
    order = best_order(sizes, [_seconds(unit, jobs) for unit in units], bins)
    gpu.cold = order is None
    if order is None:
        order = _sorted(sizes)
    first = [at for at in order if (gpu.cold if kinds[at][1] else sizes[at] > widest)]
    gpu.prefix = len(first)
    return pending(list(dict.fromkeys([*first, *order])))


def _slots(gpu: GpuPool) -> dict[int, int]:
    """Number of devices -> what a test of unknown need gets there at least, in bytes."""
    return {
        count: min(
            min(worker.slot, worker.most[count])
            for worker in gpu.workers.values()
            if count in worker.most
        )
        for count in gpu.largest
    }


def _seconds(unit: Unit, jobs: Sequence[Job]) -> float | None:
    """How long the tests of a unit take; None where one of them is unknown."""
    known = [time for test in unit.tests if (time := jobs[test].duration) is not None]
    return sum(known) if len(known) == len(unit.tests) else None


def _bins(gpu: GpuPool) -> list[Bin]:
    counts = Counter(worker.device for worker in gpu.workers.values())
    capacities = {device: gpu.ledgers[device].capacity for device in counts}
    return [Bin(capacities[d].budget, count, capacities[d].context) for d, count in counts.items()]


def best_order(
    sizes: Sequence[int], times: Sequence[float | None], bins: Sequence[Bin]
) -> list[int] | None:
    """The pieces, by their indices, in the order to start them; None where too few are known.

    A piece is a test, or tests that stay together; it needs so many bytes and takes so many
    seconds (None: unknown; the median of the known ones stands for it).
    """
    known = sorted(time for time in times if time is not None)
    if not bins or len(known) * 2 < len(times) or not known:
        return None
    median = known[len(known) // 2]
    largest = max(b.budget for b in bins)
    durations = [max(median if time is None else time, 1e-6) for time in times]
    needs = [max(1, min(size, largest)) for size in sizes]
    # A start costs the more, the more needs there are to choose from.
    levels = _levels(needs, largest)
    tries = min(MOST_TRIES, STEPS * 8 // (len(needs) * (8 + len(set(levels)))))
    if not tries:
        return _sorted(_plain(durations, needs, EXPONENTS[0]))
    bound = lower_bound(needs, durations, bins)
    plain = [_plain(durations, needs, p) for p in EXPONENTS]
    found: list[tuple[float, int, Sequence[float]]] = []
    disturbed = _disturbed(plain, tries)
    for number in range(tries):
        weights = plain[number] if number < len(plain) else disturbed(number, found[0][2])
        give_up = found[-1][0] if len(found) == FINALISTS else float("inf")
        time = _simulate(_sorted(weights), levels, durations, bins, give_up)
        if time < give_up:
            found = sorted([*found, (time, number, weights)])[:FINALISTS]
        if found and found[0][0] <= bound * 1.001:
            break
    orders = [_sorted(weights) for _, _, weights in found]
    if tries < 2 * FINALISTS * SAMPLES:
        return orders[0]
    return _steadiest(orders, levels, durations, bins)


def _steadiest(
    orders: Sequence[list[int]],
    needs: Sequence[int],
    durations: Sequence[float],
    bins: Sequence[Bin],
) -> list[int]:
    """The order that stays good where tests last a little longer or shorter than before.

    Some orders are good only because two tests end in the same millisecond.
    """
    draw = _generator(7)
    samples = [[time * (1 + 0.03 * draw()) for time in durations] for _ in range(SAMPLES)]
    return min(
        orders,
        key=lambda order: sum(
            _simulate(order, needs, sample, bins, float("inf")) for sample in samples
        ),
    )


def lower_bound(needs: Sequence[int], durations: Sequence[float], bins: Sequence[Bin]) -> float:
    """Seconds that no order can beat: by VRAM over time, by workers, by the longest test."""
    area = sum(need * time for need, time in zip(needs, durations, strict=True))
    return max(
        area / max(1, sum(b.budget for b in bins)),
        sum(durations) / max(1, sum(b.workers for b in bins)),
        max(durations, default=0.0),
    )


def _plain(durations: Sequence[float], needs: Sequence[int], power: float) -> list[float]:
    return [time * need**power for time, need in zip(durations, needs, strict=True)]


def _sorted(weights: Sequence[float]) -> list[int]:
    return sorted(range(len(weights)), key=weights.__getitem__, reverse=True)


def _disturbed(
    plain: Sequence[Sequence[float]], tries: int
) -> Callable[[int, Sequence[float]], list[float]]:
    """Random changes of the plain orders and, every second time, of the best one so far."""
    draw = _generator(1)

    def disturb(number: int, best: Sequence[float]) -> list[float]:
        if number % 2:
            origin, strength = best, 0.3
        else:
            origin, strength = plain[number // 2 % len(plain)], 0.1 + 0.9 * number / tries
        return [weight * (1 + strength * draw()) for weight in origin]

    return disturb


def _generator(state: int) -> Callable[[], float]:
    """Numbers from 0 to 1, the same in every run.

    Numerical Recipes' generator: the seeds of the standard library's belong to the tests.
    """

    def draw() -> float:
        nonlocal state
        state = (1664525 * state + 1013904223) & 0xFFFFFFFF
        return state / 2**32

    return draw


def _levels(needs: Sequence[int], largest: int) -> list[int]:
    """The needs, rounded up to few different ones where there are many."""
    if len(set(needs)) <= LEVELS:
        return list(needs)
    step = -(-largest // LEVELS)
    return [min(largest, -(-need // step) * step) for need in needs]


def _simulate(
    order: Sequence[int],
    needs: Sequence[int],
    durations: Sequence[float],
    bins: Sequence[Bin],
    give_up: float,
) -> float:
    """Seconds until the last test ends; infinite as soon as that is `give_up` or later."""
    queues: dict[int, list[tuple[int, int]]] = {}
    for rank in range(len(order) - 1, -1, -1):
        piece = order[rank]
        queues.setdefault(needs[piece], []).append((rank, piece))
    pieces = _Pieces(queues, durations)
    devices = [_Device(b) for b in bins]
    running: list[tuple[float, int, int]] = []
    now = end = 0.0
    for at, device in enumerate(devices):
        for over, need in device.fill(pieces, now):
            heappush(running, (over, at, need))
            if over >= give_up:
                return float("inf")
    while running:
        # One at a time, though others end at the very same moment: in a real run they do not.
        now, at, need = heappop(running)
        end = now
        for over, started in devices[at].over(pieces, now, need):
            if over >= give_up:
                return float("inf")
            heappush(running, (over, at, started))
    # What contexts keep from fitting: one after the other, each alone.
    return (
        end
        + sum(durations[p] for queue in pieces.queues.values() for _, p in queue)
        + sum(durations[p] for device in devices for _, p in device.bound)
    )


class _Pieces:
    """The pieces that no worker has, by need."""

    def __init__(
        self, queues: dict[int, list[tuple[int, int]]], durations: Sequence[float]
    ) -> None:
        self.queues = queues
        self.sizes = sorted(queues)
        self.durations = durations

    def take(self, size: int) -> int:
        """The first piece of this need, taken out."""
        queue = self.queues[size]
        _, piece = queue.pop()
        if not queue:
            del self.queues[size]
            self.sizes.remove(size)
        return piece


class _Device:
    """A device as the dispatcher would use it; see `backfilling` and `admission`."""

    def __init__(self, device: Bin) -> None:
        self.room = device.budget
        self.context = device.context
        self.fresh = device.workers
        self.running: list[tuple[float, int]] = []
        self.bound: list[tuple[int, int]] = []
        """(need, piece) that wait in their workers, in the order of binding."""

    def fill(self, pieces: _Pieces, now: float) -> list[tuple[float, int]]:
        """Start what workers can that have nothing yet: (end, need) of each."""
        started = []
        while self.fresh:
            size = self._first(pieces, self.room, now)
            if size < 0:
                break
            self.fresh -= 1
            started.append(self._start(pieces.take(size), size, size, pieces, now))
        return started

    def over(self, pieces: _Pieces, now: float, need: int) -> list[tuple[float, int]]:
        """A worker has ended its piece; start what now can: (end, need) of each."""
        context = self.context
        self.running.remove((now, need))
        self.room += need - context
        started = []
        for entry in self.bound[:]:
            size, piece = entry
            is_first = entry is self.bound[0]
            if size <= self.room + context and (
                is_first or self._delays_nobody(size, pieces.durations[piece], now)
            ):
                self.bound.remove(entry)
                started.append(self._start(piece, size, size - context, pieces, now))
        if pieces.sizes:
            size = self._first(pieces, self.room + context, now)
            if size >= 0:
                started.append(self._start(pieces.take(size), size, size - context, pieces, now))
            else:
                size = self._soonest(pieces)
                self.bound.append((size, pieces.take(size)))
        return started + self.fill(pieces, now)

    def _start(
        self, piece: int, need: int, more: int, pieces: _Pieces, now: float
    ) -> tuple[float, int]:
        self.room -= more
        end = now + pieces.durations[piece], need
        self.running.append(end)
        return end

    def _first(self, pieces: _Pieces, most: int, now: float) -> int:
        """The need of the first piece in the order that may start; -1: none."""
        best, first = -1, 1 << 62
        for size in pieces.sizes:
            if size > most:
                break
            rank, piece = pieces.queues[size][-1]
            if rank < first and (
                not self.bound or self._delays_nobody(size, pieces.durations[piece], now)
            ):
                first, best = rank, size
        return best

    def _delays_nobody(self, need: int, seconds: float, now: float) -> bool:
        """Whether the piece that has waited longest could start as early beside this one."""
        head = self.bound[0][0] - self.context
        left = self.room
        start = now
        for over, size in sorted(self.running):
            if left >= head:
                break
            left += size - self.context
            start = over
        return now + seconds <= start or need - self.context <= left - head

    def _soonest(self, pieces: _Pieces) -> int:
        """The need of the first piece in the order of those that will fit first."""
        left = self.room - sum(size - self.context for size, _ in self.bound)
        for _, size in sorted(self.running):
            left += size - self.context
            best, first = -1, 1 << 62
            for need in pieces.sizes:
                if need > left + self.context:
                    break
                rank = pieces.queues[need][-1][0]
                if rank < first:
                    first, best = rank, need
            if best >= 0:
                return best
        return min(pieces.sizes, key=lambda size: pieces.queues[size][-1][0])
