"""The order in which tests start: many are tried in simulation, the best is followed.

The simulation is that of the dispatcher: whenever a worker is free, the first test in the
order that fits starts. Deterministic, and bounded by a number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

STEPS = 60_000
"""Starts of tests that are simulated at most: about 100 ms on two slow cores."""

MOST_TRIES = 1_000
FINALISTS = 10
"""The best orders, of which the one is taken that bears small changes of durations best."""
SAMPLES = 10

LEVELS = 24
"""Needs that the simulation tells apart; more are rounded up."""

EXPONENTS = (0.5, 0.3, 1.0, 0.0)


class Bin(NamedTuple):
    """A device with its workers."""

    budget: int
    """Bytes."""
    workers: int
    context: int = 0
    """What an idle worker holds that has run a test, in bytes."""


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
    if len(needs) > STEPS:
        return _sorted(_plain(durations, needs, EXPONENTS[0]))
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
    sizes = sorted(queues)
    room = [b.budget for b in bins]
    fresh = [b.workers for b in bins]
    used = [0] * len(bins)
    running: list[tuple[float, int, int]] = []
    now = end = 0.0
    touched = [*range(len(bins))]
    left = len(order)
    while left or running:
        for at in touched:
            context = bins[at].context
            while fresh[at] or used[at]:
                # A worker that has a context already takes less of what is left.
                free = room[at] + (context if used[at] else 0)
                need = -1
                first = left + len(order)
                for size in sizes:
                    if size > free:
                        break
                    rank = queues[size][-1][0]
                    if rank < first:
                        first, need = rank, size
                if need < 0:
                    break
                _, piece = queues[need].pop()
                if not queues[need]:
                    del queues[need]
                    sizes.remove(need)
                if used[at]:
                    used[at] -= 1
                    room[at] += context
                else:
                    fresh[at] -= 1
                room[at] -= need
                left -= 1
                over = now + durations[piece]
                if over >= give_up:
                    return float("inf")
                heappush(running, (over, at, need))
        if not running:
            # What contexts keep from fitting: one after the other, each alone.
            return end + sum(durations[p] for queue in queues.values() for _, p in queue)
        # One at a time, though others end at the very same moment: in a real run they do not.
        now, at, need = heappop(running)
        end = now
        touched = [at]
        room[at] += need - bins[at].context
        used[at] += 1
    return end
