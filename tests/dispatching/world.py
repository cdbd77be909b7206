"""Workers, devices and time, as far as the dispatcher can see them; no processes, no waiting.

Tests do what their scripts say: they may take more than they need, keep VRAM afterwards,
kill their worker. VRAM may come back late, and others may take some. The world counts what
must never happen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any

from pytest_gpushare.scheduler.dispatcher import Dispatcher
from pytest_gpushare.scheduler.model_dispatch import ModelDispatch
from pytest_gpushare.scheduler.model_queue import ModelQueue
from pytest_gpushare.scheduler.types import (
    Action,
    Admission,
    Admit,
    CloseModel,
    DeviceCapacity,
    DeviceReading,
    Drop,
    EmptyCaches,
    Job,
    ModelGroup,
    Note,
    OpenModel,
    Park,
    Policy,
    Recall,
    Run,
    Shutdown,
    Worker,
)
from pytest_gpushare.units import GB

TICK = 0.1
"""Seconds between two steps while tests wait."""


@dataclass(frozen=True)
class Script:
    """What a test does."""

    duration: float = 1.0
    peak: int | None = None
    """Bytes that its process holds meanwhile; None: what it was admitted with."""
    keeps: int = 0
    """Bytes of caches that it leaves behind, beside the context."""
    crashes: bool = False
    teardown: float = 0.0
    """Seconds after the call."""
    frees: bool = False
    """Whether it gives back in its call what it does not keep, and not after its teardown."""


@dataclass
class Device:
    """A GPU."""

    total: int
    ollama: int = 0
    others: Callable[[float], int] = lambda _: 0
    """Bytes that others hold, by time."""
    late: list[tuple[float, int]] = field(default_factory=list)
    """(until, bytes): given back, and not free yet."""

    def free(self, held: int, at: float) -> int:
        """Bytes that NVML would call free."""
        self.late = [(until, size) for until, size in self.late if until > at]
        late = sum(size for _, size in self.late)
        return max(0, self.total - self.ollama - self.others(at) - late - held)


@dataclass
class Process:
    """A worker."""

    worker: Worker
    queue: list[int] = field(default_factory=list)
    admissions: dict[int, Admission] = field(default_factory=dict)
    waiting: int | None = None
    """The test that waits for its admission."""
    ahead: int = 0
    """Whether it asks when its last test starts."""
    has_asked: int | None = None
    """The test of which it wanted to know what follows."""
    ending: bool = False
    running: int | None = None
    held: dict[str, int] = field(default_factory=dict)
    alive: bool = True
    groups: list[str] = field(default_factory=list)
    """The groups that it went through, in order."""


class World:
    """One run."""

    def __init__(
        self,
        jobs: Sequence[Job],
        rooms: Sequence[DeviceCapacity],
        workers: Sequence[Worker],
        *,
        scripts: Mapping[int, Script] | None = None,
        devices: Mapping[str, Device] | None = None,
        policy: Policy | None = None,
        by_pid: bool = True,
        late: float = 0.0,
        restarts: int = 100,
        live: bool = True,
        look_ahead: bool = False,
        collected: Mapping[str, set[int]] | None = None,
        models: Sequence[ModelGroup] = (),
        load: float = 8.0,
        failing: Collection[int] = (),
        phase: str = "beside",
        reruns: int = 0,
        turn: float = 0.0,
        counts: bool = True,
    ) -> None:
        """Where `by_pid` and `counts` are false, nobody knows what a worker keeps.

        `models` take `load` seconds to be loaded; those that are `failing` cannot be.

        Tests that crash come again, `reruns` of them in all. Other sessions have the server for
        `turn` seconds whenever a model's turn is asked for.
        """
        self.jobs, self.rooms = jobs, {room.uuid: room for room in rooms}
        self.scripts = scripts or {}
        self.devices = devices or {r.uuid: Device(r.budget + r.safety_buffer) for r in rooms}
        self.policy = policy or Policy()
        self.models = models
        queue = ModelQueue(jobs, models) if models else None
        if queue is not None:
            queue.phase = phase
        self.dispatcher = Dispatcher(jobs, rooms, self.policy, queue)
        self.loads: list[int] = []
        """The groups whose models were loaded, in order."""
        self.loaded: set[int] = set()
        """The groups whose models are there now."""
        self.spills = 0
        """Loads for which there was not enough VRAM."""
        self._load, self._failing = load, failing
        self.processes: dict[str, Process] = {}
        self.counts = counts
        self.by_pid, self.late, self.restarts, self.live = by_pid, late, restarts, live
        self.look_ahead, self._reruns, self._turn = look_ahead, reruns, turn
        self.collected = collected or {}
        self.now = 0.0
        self.first: float | None = None
        self.last = 0.0
        self.outcomes: dict[int, list[str]] = {}
        self.admitted: list[tuple[float, str, int, int]] = []
        """(time, worker, test, need) of each GPU test."""
        self.actions: list[Action] = []
        self.wrong: list[str] = []
        self.out_of_memory = 0
        self.steps = 0
        self._said = 0
        self._events: list[tuple[float, int, Callable[..., Any], tuple[Any, ...]]] = []
        self._serial = count()
        self._next_id = len(workers)
        for worker in workers:
            self._up(worker)

    def run(self, limit: float = 1e6) -> World:
        """Until every test has its outcome, or nobody is there to run the rest."""
        self._step()
        idle = 0
        while not self.dispatcher.is_done:
            wants_step = self.dispatcher.due_at is not None
            if self._events and (
                not wants_step or self._events[0][0] <= self.now + TICK * (1 + idle // 20)
            ):
                self.now, _, happen, arguments = heappop(self._events)
                happen(*arguments)
            elif wants_step and any(p.alive for p in self.processes.values()):
                # Longer and longer, or the pressure of an hour takes a minute to simulate.
                idle = 0 if self._said != len(self.actions) else idle + 1
                self._said = len(self.actions)
                self.now += TICK * (1 + idle // 20)
                self._step()
            else:
                break
            assert self.now < limit, f"deadlock: {self.dispatcher!r}"
        return self

    @property
    def models_of_run(self) -> ModelDispatch:
        """The part of the dispatcher that knows models."""
        assert self.dispatcher.models is not None
        return self.dispatcher.models

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        return self.last - (self.first or 0.0)

    def tells(self, kind: str) -> list[Note]:
        """What was told of this kind."""
        return [a for a in self.actions if isinstance(a, Note) and a.kind == kind]

    # --- what happens ---

    def _at(self, delay: float, happen: Callable[..., Any], *arguments: Any) -> None:
        heappush(self._events, (self.now + delay, next(self._serial), happen, arguments))

    def _up(self, worker: Worker) -> None:
        self.processes[worker.id] = Process(worker, held=dict.fromkeys(worker.devices, 0))
        self.dispatcher.worker_up(worker, self.collected.get(worker.id))

    def _replace(self, old: Worker) -> None:
        self._up(old._replace(id=f"gw{self._next_id}"))
        self._next_id += 1
        self._step()

    def _down(self, process: Process, replaced: bool) -> None:
        process.alive = False
        for device, size in process.held.items():
            if self.late:
                self.devices[device].late.append((self.now + self.late, size))
        process.held.clear()
        running = self.dispatcher.worker_down(process.worker.id, replaced=replaced)
        if running is not None and self._reruns:
            self._reruns -= 1
            self.dispatcher.again(running)
        elif running is not None:
            self._outcome(running, "crashed")
        if replaced:
            self._at(0.3, self._replace, process.worker)

    def _start(self, process: Process) -> None:
        if not process.alive or process.running is not None or not process.queue:
            return
        test = process.queue[0]
        if process.waiting == test:
            return
        process.running = test
        script = self.scripts.get(test, Script())
        if self._admission(process, test).refusal:
            script = Script(0.001)
        else:
            self._check_model(test)
        self.first = self.now if self.first is None else self.first
        for device, need in self._needs(process, test).items():
            peak = need if script.peak is None else script.peak
            more = max(0, peak - process.held[device])
            if more > self._free(device):
                self.out_of_memory += 1
            else:
                process.held[device] += more
        if script.crashes:
            self._at(script.duration / 2, self._crash, process)
        else:
            self._at(script.duration, self._called, process, test, script)
        if self.look_ahead or len(process.queue) <= process.ahead:
            # Not within a step.
            self._at(0.0, self._ask, process, "start")

    def _ask(self, process: Process, when: str) -> None:
        if not process.alive or process.running is None or process.ending:
            return
        # What waits for its admission is the answer to an earlier question.
        if process.has_asked != process.queue[-1] and (
            len(process.queue) == 1 or len(process.queue) <= process.ahead
        ):
            process.has_asked = process.queue[-1]
            self.dispatcher.next_test_requested(process.worker.id, process.queue[-1], when)
            self._step()

    def _called(self, process: Process, test: int, script: Script) -> None:
        if not process.alive:
            return
        if script.frees:
            self._give_back(process, test, script)
        self._ask(process, "end")
        if script.teardown:
            self._at(script.teardown, self._finish, process, test, script)
        else:
            self._finish(process, test, script)

    def _admission(self, process: Process, test: int) -> Admission:
        return process.admissions.get(test, Admission())

    def _needs(self, process: Process, test: int) -> dict[str, int]:
        """Device -> what the test was admitted with."""
        admission, need = self._admission(process, test), self.jobs[test].need
        if not (admission.need or admission.source):
            return {}
        devices = process.worker.devices[: need.devices if need else 1]
        return dict.fromkeys(devices, admission.need)

    def _crash(self, process: Process) -> None:
        self.restarts -= 1
        self._down(process, replaced=self.restarts >= 0)
        self._step()

    def _finish(self, process: Process, test: int, script: Script) -> None:
        if not process.alive:
            return
        process.queue.remove(test)
        process.running = None
        self._outcome(test, "done")
        held = None
        if self._give_back(process, test, script):
            held = dict(process.held) if self.by_pid or (script.keeps and self.counts) else None
        wants = self.dispatcher.finished(process.worker.id, test, held, script.duration)
        self._start(process)
        if process.ending and not process.queue:
            self._down(process, False)
            wants = True
        if wants:
            self._step()

    def _give_back(self, process: Process, test: int, script: Script) -> bool:
        """Have its process hold no more than the test keeps; False: it has used no device."""
        needs = self._needs(process, test)
        for device in needs:
            keeps = self.rooms[device].context + script.keeps
            back = process.held[device] - keeps
            process.held[device] = keeps
            if self.late and back > 0:
                self.devices[device].late.append((self.now + self.late, back))
        return bool(needs)

    def _emptied(self, process: Process, withdraw: bool) -> None:
        if not process.alive:
            return
        for device in process.held:
            # Half of what is kept are fixtures.
            context = min(process.held[device], self.rooms[device].context)
            rest = 0 if withdraw else (process.held[device] - context) // 2
            process.held[device] = context + rest
        self.dispatcher.emptied(process.worker.id, dict(process.held))
        self._step()

    def _outcome(self, test: int, outcome: str) -> None:
        self.outcomes.setdefault(test, []).append(outcome)
        self.last = self.now

    # --- what the dispatcher sees and says ---

    def _free(self, device: str) -> int:
        held = sum(p.held.get(device, 0) for p in self.processes.values())
        return self.devices[device].free(held, self.now)

    def _readings(self) -> dict[str, DeviceReading]:
        if not self.live or not self.dispatcher.wants_reading:
            return {}
        return {
            uuid: DeviceReading(
                self._free(uuid),
                device.ollama,
                {p.worker.id: p.held[uuid] for p in self.processes.values() if uuid in p.held}
                if self.by_pid
                else {},
                "somebody",
                is_attributed=self.by_pid,
            )
            for uuid, device in self.devices.items()
        }

    def _step(self) -> None:
        self.steps += 1
        for action in self.dispatcher.step(self._readings(), self.now):
            self.actions.append(action)
            if isinstance(action, Note):
                continue
            if isinstance(action, OpenModel) and action.turn_only:
                if self._turn:
                    self._at(0.0, self._has_turn, action.group, True)
                self._at(self._turn, self._has_turn, action.group, False)
                continue
            if isinstance(action, OpenModel):
                for uuid, size in self.models[action.group].reservations.items():
                    if self._free(uuid) < size and self.live:
                        self.spills += 1
                delay = self._load if self.models[action.group].loads else 0.0
                self._at(delay, self._opened, action.group)
                continue
            if isinstance(action, CloseModel):
                if self._users(action.group):
                    self.wrong.append(f"{action} while {self._users(action.group)} use it")
                self._unload(action.group)
                self._at(0.1, self._closed, action.group)
                continue
            if isinstance(action, Drop):
                self._outcome(action.test, "dropped")
                continue
            process = self.processes[action.worker]
            if not process.alive or process.ending:
                self.wrong.append(f"{action} for a worker that is gone")
            elif isinstance(action, Run):
                self._take(process, action)
            elif isinstance(action, Admit):
                if process.waiting != action.test:
                    self.wrong.append(f"{action}, but {process.waiting} waits")
                process.waiting = None
                self._admit(process, action.test, action.admission)
                self._start(process)
            elif isinstance(action, Park):
                if len(process.queue) != 1:
                    self.wrong.append(f"{action} with {process.queue}")
            elif isinstance(action, Recall):
                back, process.queue = process.queue[2:], process.queue[:2]
                self._at(0.0, self._returned, process, back)
            elif isinstance(action, EmptyCaches):
                if process.running is not None:
                    self.wrong.append(f"{action} while it runs {process.running}")
                if action.withdraw:
                    process.queue.clear()
                    process.waiting = None
                self._at(0.05, self._emptied, process, action.withdraw)
            elif isinstance(action, Shutdown):
                process.ending = True
                if not process.queue:
                    self._at(0.05, self._down, process, False)
                    self._at(0.05, self._step)

    def _has_turn(self, group: int, waits: bool) -> None:
        self.models_of_run.has_turn(group, waits=waits)
        self._step()

    def _opened(self, group: int) -> None:
        if group in self._failing:
            self.models_of_run.not_opened(group, "it cannot be loaded")
        else:
            self.loads.append(group)
            self.loaded.add(group)
            for uuid, size in self.models[group].reservations.items():
                # A margin stays free beside it.
                self.devices[uuid].ollama += size - GB
            self.models_of_run.opened(group)
        self._step()

    def _unload(self, group: int) -> None:
        if group in self.loaded:
            self.loaded.discard(group)
            for uuid, size in self.models[group].reservations.items():
                self.devices[uuid].ollama -= size - GB

    def _closed(self, group: int) -> None:
        self.models_of_run.closed(group)
        self._step()

    def _users(self, group: int) -> list[int]:
        """The tests that use this model now."""
        return [
            test
            for process in self.processes.values()
            if process.alive and (test := process.running) is not None
            if self.jobs[test].model == group and not self._admission(process, test).refusal
        ]

    def _check_model(self, test: int) -> None:
        """No more at once than the server answers, and none before its model is there."""
        group = self.jobs[test].model
        if group is None:
            return
        users = self._users(group)
        if len(users) > self.models[group].parallel:
            self.wrong.append(f"{users} use model {group} at {self.now}")
        if group not in self.loaded:
            self.wrong.append(f"{test} starts at {self.now} without its model {group}")

    def _returned(self, process: Process, tests: list[int]) -> None:
        if process.alive:
            self.dispatcher.returned(process.worker.id, tests)
            self._step()

    def _take(self, process: Process, run: Run) -> None:
        process.queue.extend(run.tests)
        process.ahead = run.ahead
        process.groups += [self.jobs[t].group for t in run.tests if self.jobs[t].group]
        if run.admitted:
            for test in run.tests:
                self._admit(process, test, run.admissions.get(test, Admission()))
        else:
            (process.waiting,) = run.tests
        self._start(process)

    def _admit(self, process: Process, test: int, admission: Admission) -> None:
        process.admissions[test] = admission
        if refusal := admission.refusal:
            assert refusal[0] in ("fail", "skip")
            assert refusal[1]
        if admission.need or admission.source:
            self.admitted.append((self.now, process.worker.id, test, admission.need))
            if not admission.note:
                self._check(process, test, admission)

    def _check(self, process: Process, test: int, admission: Admission) -> None:
        """No overcommit: needs of running tests and what others hold, within the budget."""
        for device in self._needs(process, test):
            set_aside, adds = 0, True
            for other in self.processes.values():
                if device not in other.worker.devices or not other.alive:
                    continue
                queue = [t for t in other.queue if t != other.waiting]
                if other is process and test not in queue:
                    queue.append(test)
                found = [n[device] for t in queue if device in (n := self._needs(other, t))]
                set_aside += max(found, default=other.held[device])
                if other is process:
                    # One that needs no more than what is still torn down before it adds nothing:
                    # a context can be larger than the need of a test that is over elsewhere.
                    rest = [self._needs(other, t) for t in queue if t != test]
                    adds = max(found) > max((n.get(device, 0) for n in rest), default=0)
                if found and other is not process and admission.alone:
                    self.wrong.append(f"{test} alone beside {other.queue}")
            if adds and set_aside > self.rooms[device].budget:
                self.wrong.append(f"{set_aside} set aside on {device} by {test} at {self.now}")
            if self.live and admission.need - process.held[device] > self._free(device):
                self.wrong.append(f"{test} at {self.now}: {self._free(device)} free")
