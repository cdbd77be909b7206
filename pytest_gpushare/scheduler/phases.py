"""When tests that use models run: next to the GPU tests, before or after them. Pure arithmetic.

While no model is loaded for tests, the VRAM that it will take is there for GPU tests. The three
ways are simulated with the durations that earlier runs measured, and the shortest is taken: GPU
tests start whenever they fit, the largest first; models follow one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from pytest_gpushare.units import format_gb

BESIDE, BEFORE, AFTER = "beside", "before", "after"
USUAL = 1.0
"""Seconds: the assumed duration of a test when none is known."""

MOST_TESTS = 20_000
"""Beyond so many the estimate takes too long; `beside` is never wrong by much."""


class ModelLoad(NamedTuple):
    """One model and its tests."""

    vram: int
    """Bytes that have to be free for it."""
    load: float
    """Seconds that loading it should take; 0 where it is loaded already."""
    tests: Sequence[float | None]
    """Seconds of its tests; None: unknown."""
    parallel: int = 1


class Estimate(NamedTuple):
    """How long a run should take each way."""

    seconds: dict[str, float]
    chosen: str

    @property
    def text(self) -> str:
        """The arithmetic in one line."""
        each = ", ".join(f"{way} {time:.0f} s" for way, time in self.seconds.items())
        return f"{each}: {self.chosen}"


def choose(
    gpu_tests: Sequence[tuple[int, float | None]],
    models: Sequence[ModelLoad],
    budget: int,
    workers: int,
    wanted: str = "auto",
) -> Estimate:
    """The way to run; `gpu_tests` are (bytes, seconds), `budget` is what there is without models.

    `wanted` is the setting: anything but `auto` decides. Of equal ways `beside` is taken.
    """
    known = sorted(time for _, time in gpu_tests if time is not None)
    usual = known[len(known) // 2] if known else USUAL
    tests = [(size, usual if time is None else time) for size, time in gpu_tests]
    if len(tests) > MOST_TESTS:
        return Estimate({}, BESIDE if wanted == "auto" else wanted)
    chain = [(model.vram, model.load, _work(model, usual)) for model in models]
    alone = sum(load + work for _, load, work in chain)
    free = _span(tests, [], budget, workers)
    seconds = {
        BESIDE: max(alone, _span(tests, [(v, t + w) for v, t, w in chain], budget, workers)),
        BEFORE: alone + free,
        AFTER: free + alone,
    }
    chosen = min(seconds, key=lambda way: seconds[way]) if wanted == "auto" else wanted
    return Estimate(seconds, chosen)


def _work(model: ModelLoad, usual: float) -> float:
    times = [usual if time is None else time for time in model.tests]
    return max(sum(times) / max(1, model.parallel), max(times, default=0.0))


def _span(
    tests: Sequence[tuple[int, float]],
    taken: Sequence[tuple[int, float]],
    budget: int,
    workers: int,
) -> float:
    """Seconds until the last test ends; `taken`: (bytes, seconds) that models take in turn."""
    changes = []
    at = 0.0
    for size, seconds in taken:
        changes.append((at, budget - size))
        at += seconds
    changes.append((at, budget))
    waiting = sorted(tests, key=lambda test: (-test[0], -test[1]))
    running: list[tuple[float, int]] = []
    now = held = 0.0
    step, end = 0, 0.0
    while waiting or running:
        while step + 1 < len(changes) and changes[step + 1][0] <= now:
            step += 1
        limit, place = changes[step][1], 0
        while place < len(waiting) and len(running) < workers:
            size, seconds = waiting[place]
            if held + size <= limit or (not running and step + 1 == len(changes)):
                del waiting[place]
                held += size
                heappush(running, (now + seconds, size))
                end = max(end, now + seconds)
            else:
                place += 1
        later = changes[step + 1][0] if step + 1 < len(changes) else float("inf")
        if running and running[0][0] <= later:
            now, size = heappop(running)
            held -= size
        elif later < float("inf"):
            now = later
        elif not running:
            break
    return end


def too_large(need: int, vram: int, model: str, budget: int) -> str:
    """Why a test can never run next to its own model; empty where it can."""
    if need + vram <= budget:
        return ""
    return (
        f"needs {format_gb(need)} of VRAM next to its model {model}, which takes "
        f"{format_gb(vram)}: the largest budget is {format_gb(budget)}: lower the need, or use a "
        "smaller model or context"
    )
