"""Between xdist's workers and the dispatcher: events in, commands out, in xdist's own thread."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Collection as Numbers
from typing import TYPE_CHECKING, Any

from pytest_gpushare.plan.work import (
    Action,
    Drop,
    EmptyCaches,
    Instead,
    Run,
    Shutdown,
    Tell,
    Worker,
)

if TYPE_CHECKING:
    from pytest_gpushare.plan.dispatcher import Dispatcher
    from pytest_gpushare.run.journal import Journal
    from pytest_gpushare.run.links import Links
    from pytest_gpushare.run.readings import Readings
    from pytest_gpushare.run.suite import Collection


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
        journal: Journal,
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
