"""Between xdist's workers and the dispatcher: events in, commands out, in xdist's own thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Collection as Numbers
from typing import TYPE_CHECKING, Any

from pytest_gpushare.gpu.attribution import Attribution, ProcessSplit
from pytest_gpushare.gpu.devices import GpuProcess, Memory
from pytest_gpushare.gpu.sampler import MEMORY_AGE, PROCESSES_AGE, LiveVram
from pytest_gpushare.ollama.models import OLLAMA
from pytest_gpushare.scheduler.types import (
    Action,
    Drop,
    EmptyCaches,
    Instead,
    Reading,
    Run,
    Shutdown,
    Tell,
    Worker,
)
from pytest_gpushare.units import format_gb

if TYPE_CHECKING:
    from pytest_gpushare.dispatch.suite import Collection
    from pytest_gpushare.scheduler.dispatcher import Dispatcher
    from pytest_gpushare.session.tests import RecordedTests
    from pytest_gpushare.wire import Links


PAUSE = 0.025
"""Seconds between two nudges."""


class Ticker:
    """A service that calls `nudge` from a thread of its own while `waits` says so.

    Where nothing waits the thread sleeps until it is woken: to look forty times a second would
    cost 0.6 % of the controller's CPU time in a run of tests that do nothing.
    """

    def __init__(self, waits: Callable[[], bool], nudge: Callable[[], None]) -> None:
        self._waits = waits
        self._nudge = nudge
        self._stop = threading.Event()
        self._awake = threading.Event()
        self._awake.set()
        self._thread = threading.Thread(target=self._run, name="gpu-share-ticker", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def wake(self) -> None:
        """Something may wait from now on."""
        self._awake.set()

    def stop(self) -> None:
        """Nudge no more."""
        self._stop.set()
        self._awake.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        while not self._stop.wait(PAUSE):
            # Before the look: who wakes meanwhile must not be overheard.
            self._awake.clear()
            if self._stop.is_set():
                break
            if self._waits():
                self._nudge()
                continue
            self._awake.wait()


SOONEST = 0.02
"""Seconds between two readings, however fast tests end."""

_MOST_HOLDERS = 5
"""Named in a message."""


class Readings:
    """Readings of the devices for the dispatcher; NVML is asked no more often than it must be."""

    def __init__(
        self,
        live: LiveVram | None,
        devices: Sequence[str],
        resident: Callable[[], Mapping[str, int]] = dict,
        attribution: Attribution | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`resident` gives UUID -> bytes that Ollama holds, where somebody knows."""
        self.workers: dict[int, str] = {}
        """PID -> id of the worker, of those that are there."""
        self._live = live
        self._devices = devices
        self._resident = resident
        self._attribution = attribution or Attribution()
        self._clock = clock
        self._reported: dict[str, float] = {}
        self._telling: set[str] = set()
        """UUIDs of devices of which it was told what a worker holds there."""
        self._last_report = float("-inf")
        self._basis: object = None
        """What the last answer was made of."""
        self._found: dict[str, Reading] = {}

    def has_reported(self, worker: str) -> None:
        """A GPU worker has done a test: what was read before shows what it held then."""
        self._last_report = self._reported[worker] = self._clock()

    def now(self) -> Mapping[str, Reading]:
        """UUID -> reading; empty where nobody can be asked.

        The same mapping as before as long as nothing was read anew; no answer changes later.
        """
        if self._live is None:
            return {}
        # The processes first: of what a test allocates meanwhile, free must show at least as
        # much as its worker does, or the room would be counted twice.
        age = max(SOONEST, self._clock() - self._last_report)
        processes = self._live.processes(min(PROCESSES_AGE, age))
        # Free VRAM that is older than the processes lacks what they have taken since: it would
        # be given away twice. One thread reads both, so the younger one began after the other.
        younger = max(0.0, self._clock() - processes.at)
        memory_read = self._live.memory(min(MEMORY_AGE, age, younger))
        if not self._live.is_answering:
            # The last figures are of another moment: admission goes on by its accounts.
            return {}
        memory = memory_read.devices
        resident = self._resident()
        # What a test that is over held would be taken for what the next one has allocated.
        old = {worker for worker, at in self._reported.items() if at > processes.at}
        basis = processes.at, memory_read.at, dict(resident), old, dict(self.workers)
        if basis == self._basis:
            return self._found
        self._basis = basis
        self._found = found = {}
        for uuid in self._devices:
            held = processes.devices.get(uuid)
            split = self._attribution.split(held, self.workers)
            reading = _reading(memory.get(uuid), split, self.workers, resident.get(uuid))
            found[uuid] = reading._replace(
                held={**self._absent(uuid, held), **reading.held, **dict.fromkeys(old)}
            )
            if any(reading.held.values()):
                self._telling.add(uuid)
        return found

    def _absent(
        self, device: str, processes: Sequence[GpuProcess] | None
    ) -> Mapping[str, int | None]:
        """Who is not in a list that names workers: it has no context there, and holds nothing."""
        is_told = processes is not None and device in self._telling
        return dict.fromkeys(self.workers.values(), 0) if is_told else {}


def _reading(
    memory: Memory | None,
    split: ProcessSplit | None,
    workers: Mapping[int, str],
    resident: int | None,
) -> Reading:
    free = None if memory is None else memory.free
    listed: dict[str, int] = {}
    held: dict[str, int | None] = {}
    others: list[tuple[int, str]] = []
    if split is not None:
        listed = {name: size for name, size in split.neighbours.items() if size}
        ids = set(workers.values())
        held = {worker: size for worker, size in split.workers.items() if worker in ids}
        others = [(size, f"PID {p} {format_gb(size)}") for p, size in split.others.items() if size]
    told = resident if resident is not None else (sum(listed.values()) or None)
    names = [text for _, text in sorted(others, reverse=True)[:_MOST_HOLDERS]]
    if told:
        names.insert(0, f"{next(iter(listed), OLLAMA)} {format_gb(told)}")
    return Reading(free, told, held, ", ".join(names))


class _Hand:
    """A worker, and whether the rest item stands at the end of its queue."""

    def __init__(self, node: Any, collection: Collection, devices: Sequence[str]) -> None:
        self.node = node
        self.collection = collection
        self.rest = len(collection.ids)
        self.rests = False
        self.devices = devices
        self.sent: set[int] = set()
        """Numbers of the tests that it was sent and has not done."""
        self.gives_up_fixtures = False


class HandOut:
    """Sends each worker what the dispatcher says, and tells the dispatcher what came of it."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        nodeids: Sequence[str],
        links: Links,
        readings: Readings,
        contexts: Mapping[str, int],
        journal: RecordedTests,
        tell: Callable[..., object],
        report_lost: Callable[[str, str], None],
    ) -> None:
        """`contexts`: UUID -> bytes of a CUDA context, which no framework counts."""
        self._dispatcher = dispatcher
        self._nodeids = nodeids
        self._links = links
        self._readings = readings
        self._contexts = contexts
        self._journal = journal
        self._tell = tell
        self._report_lost = report_lost
        self._hands: dict[str, _Hand] = {}
        self._held: dict[str, Mapping[str, int]] = {}
        self._emptied: list[tuple[str, Mapping[str, int]]] = []
        self.on_wait: Callable[[], object] = lambda: None
        """Called, in any thread, when a step may do something though no worker says anything."""

    @property
    def is_done(self) -> bool:
        """Whether every test has had its outcome."""
        return self._dispatcher.is_done

    @property
    def waits(self) -> bool:
        """Whether a step may do something though no worker says anything."""
        return bool(self._emptied) or self._dispatcher.wants_step

    def node(self) -> Any:
        """Any worker that is there, to speak for all; None without workers."""
        return next((hand.node for hand in self._hands.values()), None)

    def join(self, node: Any, worker: Worker, collection: Collection, pid: int) -> None:
        """A worker is ready for tests."""
        self._hands[worker.id] = _Hand(node, collection, worker.devices)
        known: Numbers[int] | None = None
        if collection.indices is not None:
            known = collection.indices.keys()
        elif len(collection.ids) < len(self._nodeids):
            known = range(len(collection.ids))
        self._readings.workers[pid] = worker.id
        self._links.send(worker.id, "pull")
        self._dispatcher.worker_up(worker, known)

    def knows(self, worker: str) -> bool:
        """Whether this worker has joined."""
        return worker in self._hands

    def leave(self, worker: str, *, replaced: bool, torn_down: str | None = None) -> str | None:
        """A worker is gone; returns the test in which it died, where it died in one.

        `torn_down` is the last test that it has run, if the class, module or session of that one
        was not torn down yet, as far as is known.
        """
        hand = self._hands.pop(worker, None)
        if hand is None:
            return None
        self._held.pop(worker, None)
        began = torn_down is None
        lost = self._dispatcher.worker_down(worker, replaced=replaced, began=began)
        if began:
            # What the dispatcher gave to a worker that xdist had told to end was never sent.
            return self._nodeids[lost.running] if lost.running in hand.sent else None
        goes_on = hand.sent or hand.node.shutting_down or hand.gives_up_fixtures
        return torn_down if goes_on else None

    def done(self, worker: str, index: int, duration: float) -> None:
        """A worker has done a test, or its rest item."""
        hand = self._hands.get(worker)
        if hand is None or index == hand.rest:
            return
        number = hand.collection.numbers[index]
        hand.sent.discard(number)
        if hand.devices:
            self._readings.has_reported(worker)
        if self._dispatcher.finished(worker, number, self._held.pop(worker, None), duration):
            self.step()

    def again(self, number: int) -> None:
        """Dispatch once more a test that is over."""
        self._dispatcher.again(number)

    def hold(self, worker: str, told: Mapping[str, Any]) -> None:
        """A worker tells, in any thread, what its frameworks hold after a test."""
        self._held[worker] = self._by_device(worker, told.get("helds"))

    def emptied(self, worker: str, held: Sequence[int | None] | None) -> None:
        """A worker tells, in any thread, what they hold now that their caches are empty."""
        self._emptied.append((worker, self._by_device(worker, held)))
        self.on_wait()

    def _by_device(self, worker: str, held: Sequence[int | None] | None) -> Mapping[str, int]:
        """UUID -> bytes with the context, from what frameworks count by visible device."""
        hand = self._hands.get(worker)
        if hand is None or held is None:
            return {}
        pairs = zip(hand.devices, held, strict=False)
        return {uuid: size + self._contexts.get(uuid, 0) for uuid, size in pairs if size}

    def step(self) -> None:
        """Do what is to be done now."""
        dispatcher = self._dispatcher
        while self._emptied:
            worker, held = self._emptied.pop(0)
            if worker in self._hands:
                self._hands[worker].gives_up_fixtures = False
            self._readings.has_reported(worker)
            dispatcher.emptied(worker, held)
        readings = self._readings.now() if dispatcher.wants_reading else {}
        for action in dispatcher.step(readings, time.monotonic()):
            self._carry_out(action)
        if self.waits:
            self.on_wait()

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, Tell):
            self._tell(action.kind, action.text, **action.facts)
            return
        if isinstance(action, Drop):
            self._report_lost(self._nodeids[action.test], f"gpu-share: {action.reason}")
            return
        hand = self._hands.get(action.worker)
        # A worker that was told to end, by us or by xdist after a failure, gets nothing more.
        if hand is None or hand.node.shutting_down:
            return
        # One that has died meanwhile: xdist will say so, and what it had comes again.
        with contextlib.suppress(OSError):
            if isinstance(action, Run):
                self._run(hand, action)
            elif isinstance(action, Instead):
                index = hand.collection.place(action.test)
                self._links.send(action.worker, "instead", [index, action.outcome, action.reason])
                self._send(hand, [action.test], last=True)
            elif isinstance(action, EmptyCaches):
                hand.gives_up_fixtures = action.fixtures
                self._links.send(action.worker, "empty", action.fixtures)
                # The rest item that it has is over when another one is behind it.
                hand.node.send_runtest_some([hand.rest])
            elif isinstance(action, Shutdown):
                hand.node.shutdown()

    def _run(self, hand: _Hand, action: Run) -> None:
        if action.source or action.note:
            self._tell_of(action)
        self._send(hand, action.tests, last=action.last)

    def _tell_of(self, action: Run) -> None:
        """A GPU test comes alone: the worker and the report hear how it was admitted."""
        nodeid, journal = self._nodeids[action.tests[0]], self._journal
        if action.source:
            self._links.send(action.worker, "need", [nodeid, action.need])
            journal.need(nodeid, action.need, action.source)
        if action.waited:
            journal.waited(nodeid, action.waited)
        if action.note:
            journal.remark(nodeid, action.note)

    def _send(self, hand: _Hand, tests: Sequence[int], *, last: bool) -> None:
        indices = [hand.collection.place(test) for test in tests]
        if last and (indices or not hand.rests):
            indices.append(hand.rest)
        if indices:
            hand.rests = last
            hand.sent.update(tests)
            hand.node.send_runtest_some(indices)
