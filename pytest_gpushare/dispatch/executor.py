"""Between xdist's workers and the dispatcher: events in, commands out, in xdist's own thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Collection as Numbers
from typing import TYPE_CHECKING, Any

from pytest_gpushare.dispatch.device_readings import DeviceReadings
from pytest_gpushare.dispatch.suite import Collection
from pytest_gpushare.scheduler.types import (
    Action,
    Admission,
    Admit,
    CloseModel,
    Drop,
    EmptyCaches,
    Note,
    OpenModel,
    Park,
    Raised,
    Recall,
    Run,
    Shutdown,
    Worker,
)
from pytest_gpushare.wire import squeezed

if TYPE_CHECKING:
    from pytest_gpushare.dispatch.leases_by_test import SharedDevices
    from pytest_gpushare.scheduler.dispatcher import Dispatcher
    from pytest_gpushare.scheduler.types import DeviceReading
    from pytest_gpushare.session.llm import LlmTests
    from pytest_gpushare.session.start_facts import LeasesElsewhereProtocol
    from pytest_gpushare.session.tests import RecordedTests
    from pytest_gpushare.wire import Links


PAUSE = 0.025
"""Seconds between two steps while tests wait for VRAM."""


class Timer:
    """A service that has a step done, from a thread of its own, when one is due.

    Where none is due the thread sleeps until it is woken: to look forty times a second would
    cost 0.6 % of the controller's CPU time in a run of tests that do nothing.
    """

    def __init__(self, due_in: Callable[[], float | None], wake: Callable[[], None]) -> None:
        """`due_in`: seconds until a step is due, None while none is; `wake` has it done."""
        self._due_in = due_in
        self._wake = wake
        self._stop = threading.Event()
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-share-timer", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def look(self) -> None:
        """A step may be due from now on."""
        self._changed.set()

    def stop(self) -> None:
        """Wake nobody any more."""
        self._stop.set()
        self._changed.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            # Before the look: who sets it meanwhile must not be missed.
            self._changed.clear()
            due = self._due_in()
            if due is None or due > 0:
                self._changed.wait(due)
            else:
                self._wake()
                # The step says when the next one is due.
                self._changed.wait(PAUSE)


class _Member:
    """A worker."""

    def __init__(self, node: Any, collection: Collection, devices: Sequence[str]) -> None:
        self.node = node
        self.collection = collection
        self.devices = devices
        self.unsent: set[int] = set()
        """Numbers of the tests that could not be sent: its process has died."""


class Executor:
    """Sends each worker what the dispatcher decides, and passes what happens to the dispatcher."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        nodeids: Sequence[str],
        links: Links,
        readings: DeviceReadings,
        contexts: Mapping[str, int],
        tests: RecordedTests,
        note: Callable[..., object],
        report_lost: Callable[[str, str], None],
        is_stopping: Callable[[], bool],
    ) -> None:
        """`contexts`: UUID -> bytes of a CUDA context, which no framework counts."""
        self._dispatcher = dispatcher
        self._nodeids = nodeids
        self._links = links
        self._readings = readings
        self._contexts = contexts
        self._tests = tests
        self._note = note
        self._report_lost = report_lost
        self._is_stopping = is_stopping
        self._members: dict[str, _Member] = {}
        self._held: dict[str, Mapping[str, int]] = {}
        self._due: float | None = None
        self.models: LlmTests | None = None
        """What loads the models that tests use; None where none does."""
        self.shared: SharedDevices | None = None
        """Where other sessions of the host may use the devices, too."""
        self.elsewhere: LeasesElsewhereProtocol | None = None
        """The same on other hosts."""
        self._has_changed = False
        """Whether a worker holds other VRAM than the other sessions know."""
        self.on_due: Callable[[], object] = lambda: None
        """Called when a step is due at some time though no worker reports anything."""

    @property
    def is_done(self) -> bool:
        """Whether every test has had its outcome."""
        return self._dispatcher.is_done

    def due_in(self) -> float | None:
        """Seconds until a step may do something though no worker reports anything."""
        due = self._due
        return None if due is None else max(0.0, due - time.monotonic())

    def node(self) -> Any:
        """Any worker that is there, to speak for all; None without workers."""
        return next((member.node for member in self._members.values()), None)

    def join(self, node: Any, worker: Worker, collection: Collection, pid: int) -> None:
        """A worker is ready for tests."""
        self._members[worker.id] = _Member(node, collection, worker.devices)
        known: Numbers[int] | None = None
        if collection.indices is not None:
            known = collection.indices.keys()
        elif len(collection.ids) < len(self._nodeids):
            known = range(len(collection.ids))
        self._readings.workers[pid] = worker.id
        self._links.send(worker.id, "dispatch")
        self._dispatcher.worker_up(worker, known)

    def knows(self, worker: str) -> bool:
        """Whether this worker has joined."""
        return worker in self._members

    def leave(self, worker: str, *, replaced: bool) -> str | None:
        """A worker is gone; returns the test that it had begun and not done."""
        member = self._members.pop(worker, None)
        if member is None:
            return None
        self._held.pop(worker, None)
        self._has_changed = True
        running = self._dispatcher.worker_down(worker, replaced=replaced, unsent=member.unsent)
        return None if running is None else self._nodeids[running]

    def on_test_done(self, worker: str, index: int, duration: float) -> None:
        """A worker has done a test."""
        member = self._members.get(worker)
        if member is None:
            return
        number = member.collection.numbers[index]
        if member.devices:
            self._readings.has_reported(worker)
            self._has_changed = True
        if self._dispatcher.finished(worker, number, self._held.pop(worker, None), duration):
            self.step()

    def on_message(self, worker: str, message: Sequence[Any]) -> None:
        """Pass a worker's message to the dispatcher; an empty one only makes a step."""
        member = self._members.get(worker)
        if member is not None and message:
            kind, payload = message[0], message[1:]
            if kind == "asked":
                test, when = member.collection.numbers[payload[0]], str(payload[1])
                if when == "end":
                    self._readings.require_current()
                self._dispatcher.next_test_requested(worker, test, when)
            elif kind == "emptied":
                self._readings.has_reported(worker)
                self._has_changed = True
                self._dispatcher.emptied(worker, self._by_device(worker, payload[0]))
            elif kind == "raise":
                self._has_changed = True
                number, size, takes_less = map(int, payload[:3])
                self._dispatcher.wants_more(worker, number, size, takes_less=bool(takes_less))
            elif kind == "returned":
                numbers = [member.collection.numbers[index] for index in payload[0]]
                self._dispatcher.returned(worker, numbers)
        self.step()

    def again(self, number: int) -> None:
        """Dispatch once more a test that is over."""
        self._dispatcher.again(number)

    def note_held(self, worker: str, message: Mapping[str, Any]) -> None:
        """Keep, in any thread, what a worker's frameworks hold after a test."""
        self._held[worker] = self._by_device(worker, message.get("helds"))

    def _by_device(self, worker: str, held: Sequence[int | None] | None) -> Mapping[str, int]:
        """UUID -> bytes with the context, from what frameworks count by visible device."""
        member = self._members.get(worker)
        if member is None or held is None:
            return {}
        pairs = zip(member.devices, held, strict=False)
        return {uuid: size + self._contexts.get(uuid, 0) for uuid, size in pairs if size}

    def step(self) -> None:
        """Do what is to be done now."""
        dispatcher = self._dispatcher
        if self.models is not None and dispatcher.models is not None:
            self.models.deliver(dispatcher.models)
        # xdist ends a run after a failure under -x, or when no worker may be replaced any more.
        dispatcher.stop(self._is_stopping())
        for action in self._decided():
            self._carry_out(action)
        # Kept for the timer's thread, which must not look into the dispatcher.
        due = dispatcher.due_at
        if due is not None:
            if self.shared is not None and self.shared.is_shared:
                due = max(due, self.shared.due_at)
            if due == float("-inf"):
                now, soon = time.monotonic(), self._readings.due_at
                due = min(now + PAUSE, soon if soon > now else float("inf"))
        before, self._due = self._due, due
        if due is not None and (before is None or due < before):
            # Else the timer looks again at the time that it knows, and learns the later one.
            self.on_due()

    def _decided(self) -> list[Action]:
        elsewhere, is_changed = self.elsewhere, self._has_changed
        is_asked = elsewhere is not None and (
            elsewhere.is_due
            or (elsewhere.is_shared and (is_changed or self._dispatcher.wants_reading))
        )
        if elsewhere is None or not is_asked:
            return self._decided_by(self._readings.now, is_due=False)
        actions = self._decided_by(
            lambda: elsewhere.limited(self._readings.now()), is_due=elsewhere.is_due
        )
        self._has_changed = False
        elsewhere.publish(self._dispatcher.shares())
        return actions

    def _decided_by(
        self, read: Callable[[], Mapping[str, DeviceReading]], *, is_due: bool
    ) -> list[Action]:
        dispatcher, shared = self._dispatcher, self.shared
        wants_reading = dispatcher.wants_reading or is_due
        if (
            shared is not None
            and shared.is_shared
            and (wants_reading or self._has_changed or shared.is_due)
        ):
            self._has_changed = False
            return shared.step(dispatcher, read)
        return dispatcher.step(read() if wants_reading else {}, time.monotonic())

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, Note):
            self._note(action.kind, action.text, **action.facts)
        elif isinstance(action, Drop):
            self._report_lost(self._nodeids[action.test], f"gpu-share: {action.reason}")
        elif isinstance(action, (OpenModel, CloseModel)):
            if self.models is not None:
                self.models.obey(action)
        elif (member := self._members.get(action.worker)) is not None:
            self._command(action.worker, member, action)

    def _command(
        self,
        worker: str,
        member: _Member,
        action: Run | Admit | Park | EmptyCaches | Recall | Raised | Shutdown,
    ) -> None:
        if isinstance(action, Run):
            self._run(worker, member, action)
        elif isinstance(action, Admit):
            self._record(action.test, action.admission)
            admission = action.admission
            message = {
                "test": member.collection.place(action.test),
                "need": admission.need if admission.source else None,
                "refusal": list(admission.refusal) if admission.refusal else None,
            }
            self._send(worker, member, "admit", message, [action.test])
        elif isinstance(action, Park):
            self._links.send(worker, "park")
        elif isinstance(action, EmptyCaches):
            self._links.send(worker, "empty", action.withdraw)
        elif isinstance(action, Recall):
            self._links.send(worker, "recall")
        elif isinstance(action, Raised):
            self._links.send(worker, "raised", action._asdict())
        elif isinstance(action, Shutdown):
            member.node.shutdown()

    def _run(self, worker: str, member: _Member, action: Run) -> None:
        place, admissions = member.collection.place, action.admissions
        for test, admission in admissions.items():
            self._record(test, admission)
        found = (admissions.get(test) for test in action.tests)
        needs = squeezed(one.need if one is not None and one.source else None for one in found)
        message = {
            "tests": [place(test) for test in action.tests],
            "needs": needs,
            "refusals": {
                place(test): list(one.refusal)
                for test, one in admissions.items()
                if one.refusal is not None
            },
            "admitted": action.admitted,
            "ahead": action.ahead,
        }
        self._send(worker, member, "run", message, action.tests if action.admitted else ())

    def _send(
        self, worker: str, member: _Member, kind: str, message: object, tests: Sequence[int]
    ) -> None:
        if not self._links.send(worker, kind, message):
            # Its process has died, and xdist will say so: these have not begun.
            member.unsent.update(tests)

    def _record(self, test: int, admission: Admission) -> None:
        """Note for the report how a test was admitted."""
        nodeid, tests = self._nodeids[test], self._tests
        if admission.source:
            tests.need(nodeid, admission.need, admission.source)
        if admission.waited:
            tests.waited(nodeid, admission.waited)
        if admission.note:
            tests.remark(nodeid, admission.note)
