"""The monitor's pure core beside the simulator's scheduler: both see the same spills.

The scheduler places models by Ollama's rules; what holds the VRAM here are no processes but
figures, so that hundreds of histories take seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator.hardware import DeviceState, OutOfMemoryError
from simulator.ollama import Model, Settings
from simulator.ollama.placement import MARGIN, Room, place_alone, place_beside
from simulator.ollama.scheduler import LoadError, Scheduler
from simulator.sizes import to_bytes

from pytest_gpushare.gpu.attribution import DeviceUsage
from pytest_gpushare.ollama.history import SPILLED, History
from pytest_gpushare.ollama.models import LoadedModel
from pytest_gpushare.ollama.prediction import OVERHEAD
from pytest_gpushare.ollama.spill import Cause, Promise, Spill, judge
from pytest_gpushare.units import GB, MB

MODELS = {
    name: Model(name, size)
    for name, size in {"a:14b": "10.8GB", "b:7b": "4.7GB", "c:3b": "2.2GB", "d:32b": "19GB"}.items()
}
TOTAL = 24 * GB


class Vram:
    """One device without processes; in place of the simulated machine."""

    def __init__(self, others: int) -> None:
        self.others = others
        self.tests: dict[str, int] = {}
        self.runners: dict[int, int] = {}

    @property
    def used(self) -> int:
        return self.others + sum(self.tests.values()) + sum(self.runners.values())

    def snapshot(self) -> list[DeviceState]:
        return [
            DeviceState(
                record=0,
                uuid="GPU-0",
                name="",
                total=TOTAL,
                reserved=0,
                used=self.used,
                free=TOTAL - self.used,
                peak_used=0,
                oom_count=0,
                processes=(),
                parent=None,
                mig_index=None,
                capability=(8, 6),
                mig_enabled=False,
            )
        ]

    def allocate(self, _uuid: str, nbytes: Any, pid: int, *, context: Any = 0) -> int:
        size = to_bytes(nbytes) + to_bytes(context)
        if size > TOTAL - self.used:
            raise OutOfMemoryError("CUDA out of memory.")
        self.runners[pid] = self.runners.get(pid, 0) + size
        return pid

    def held(self) -> dict[str, DeviceUsage]:
        ollama = sum(self.runners.values())
        return {
            "GPU-0": DeviceUsage(
                TOTAL,
                self.used,
                TOTAL - self.used,
                {"Ollama": ollama},
                dict(self.tests),
                0,
                {"Ollama": ollama} if ollama else {},
            )
        }


class Runners:
    """In place of the processes that hold the models."""

    def __init__(self, vram: Vram) -> None:
        self._vram = vram
        self._last = 0

    def start(self, _digest: str, _port: int) -> int:
        self._last += 1
        self._vram.runners[self._last] = 0
        return self._last

    def stop(self, pid: int) -> None:
        self._vram.runners.pop(pid, None)

    def is_alive(self, pid: int) -> bool:
        return pid in self._vram.runners


class World(NamedTuple):
    """A device, an Ollama beside it, and what the plan promised."""

    vram: Vram
    ollama: Scheduler
    promise: Promise
    context: int

    def models(self) -> tuple[LoadedModel, ...]:
        """What `/api/ps` would say."""
        return tuple(
            LoadedModel(e.model.full_name, e.size, e.placement.vram, e.model.digest, e.key[0])
            for e in self.ollama.loaded()
        )

    def load(self, name: str, context: int, num_gpu: int = -1) -> None:
        try:
            entry = self.ollama.acquire(
                MODELS[name],
                options={"num_ctx": context, "num_gpu": num_gpu},
                keep_alive=3600,
            )
        except LoadError:
            return
        self.ollama.release(entry)


@contextmanager
def world(reservation: int, others: int, context: int) -> Iterator[World]:
    vram = Vram(others)
    ollama = Scheduler(vram, Runners(vram), Settings(context=context))  # type: ignore[arg-type]
    start = vram.held()
    budget = max(0, start["GPU-0"].free - reservation - GB)
    promise = Promise(start, {"GPU-0": budget}, reservation, GB, 3 * GB)
    try:
        yield World(vram, ollama, promise, context)
    finally:
        ollama.close()


sizes = st.integers(0, 12).map(lambda n: n * GB // 2)
steps = st.one_of(
    st.tuples(st.just("load"), st.sampled_from(sorted(MODELS)), st.sampled_from([4096, 8192])),
    st.tuples(st.just("num_gpu"), st.sampled_from(sorted(MODELS)), st.integers(0, 48)),
    st.tuples(st.just("unload"), st.sampled_from(sorted(MODELS)), st.just(0)),
    st.tuples(st.just("gw0"), st.just(""), sizes),
    st.tuples(st.just("gw1"), st.just(""), sizes),
    st.tuples(st.just("others"), st.just(""), sizes),
)


def take(step: tuple[str, str, int], here: World) -> None:
    what, name, value = step
    vram = here.vram
    if what == "load":
        here.load(name, value)
    elif what == "num_gpu":
        here.load(name, 4096, value)
    elif what == "unload":
        here.ollama.unload(MODELS[name])
    elif what == "others":
        vram.others = min(value + 2 * GB, vram.others + TOTAL - vram.used)
    else:
        vram.tests.pop(what, None)
        if fits := min(value, TOTAL - vram.used):
            vram.tests[what] = fits


@settings(max_examples=200)
@given(
    st.lists(steps, min_size=1, max_size=12),
    st.sampled_from([0, 4 * GB, 8 * GB, 12 * GB, 16 * GB]),
    st.sampled_from([0, 500 * MB]),
)
def test_every_spill_is_seen(
    history_of: list[tuple[str, str, int]], reservation: int, context: int
) -> None:
    """Each load that leaves a part on the CPU is one spill, and nothing else is one."""
    with world(reservation, 2 * GB, context) as here:
        history = History(here.models())
        for at, step in enumerate(history_of, 1):
            before, held_before = set(here.models()), here.vram.held()
            take(step, here)
            now = here.models()
            changes = history.look(float(at), now)
            seen = {change.model for change in changes if change.kind == SPILLED}
            assert seen == {model for model in set(now) - before if model.is_spilled}
            for model in seen:
                assert model is not None
                beside = [other for other in now if other.name != model.name]
                window = [held_before, here.vram.held()]
                check(judge(at, model, beside, window, here.promise), here)


def check(spill: Spill, here: World) -> None:
    """What the verdict claims is true of the scheduler's own rules."""
    tests = sum(here.vram.tests.values())
    kept_to_budget = tests <= sum(here.promise.budgets.values())
    if spill.cause is Cause.TESTS:
        assert not kept_to_budget
    if spill.is_ours:
        assert tests
    if spill.cause is Cause.SIZE:
        rooms = [Room("GPU-0", spill.room - max(here.context, OVERHEAD))]
        alone = place_alone(spill.model.size, 48, rooms, MARGIN)
        assert alone.vram < spill.model.size
    if spill.setting is not None and spill.setting.key == "ollama_vram_reservation_mb":
        assert_a_run_with_it_passes(spill, here)


def assert_a_run_with_it_passes(spill: Spill, here: World) -> None:
    """With the reservation that is named, and tests that take all that it leaves them."""
    assert spill.setting is not None
    start = here.promise.start["GPU-0"]
    kept = int(spill.setting.value) * MB
    budget = max(0, start.free - kept - GB)
    beside = sum(m.size_vram + here.context for m in here.models() if m.name != spill.model.name)
    others = here.vram.others if spill.cause is Cause.OTHERS else start.used
    free = TOTAL - others - budget - beside - here.context
    described = place_beside(spill.model.size, [Room("GPU-0", max(0, free))]) if beside else None
    if described is None:
        # The other models have to leave.
        described = place_alone(spill.model.size, 48, [Room("GPU-0", free + beside)], MARGIN)
    assert described.vram == spill.model.size, (spill, free / GB)


@pytest.mark.parametrize("context", [0, 500 * MB])
def test_the_seeds_case(context: int) -> None:
    """24 GB, 12 GB reserved: tests that take their 9 GB never move the model of 10.8 GB."""
    with world(12 * GB, 2 * GB, context) as here:
        here.vram.tests = {"gw0": 9 * GB // 2, "gw1": 9 * GB // 2}
        here.load("a:14b", 4096)
        assert [model.is_whole for model in here.models()] == [True]
