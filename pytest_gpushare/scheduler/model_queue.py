"""Tests that use a model of Ollama's: which model is loaded when, and which test starts then.

Tests of one group use one model with one context. A group is *open* while its model is loaded for
it. Its tests are handed out while it is open, no more at once than the server answers: so no test
waits inside its own time-out, and models do not take turns. A worker holds one of the places of a
group as long as it has a test of it, so that the next one may follow without a gap.

Under `--dist` with groups the tests of a group stay together on one worker, in order: a *chain*.
Its next test may wait in the worker, between two protocols, until its model is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from pytest_gpushare.scheduler.types import BESIDE, CloseModel, Job, ModelGroup, OpenModel


class State(Enum):
    """What is known of the model of a group."""

    CLOSED = "closed"
    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"


class Offer(NamedTuple):
    """What a worker is sent."""

    test: int
    admitted: bool = True
    """Whether it may start; else it waits in the worker until its model is there."""
    refusal: tuple[str, str] | None = None


class GroupState:
    """One group, and what became of its tests."""

    def __init__(self, facts: ModelGroup) -> None:
        self.facts = facts
        self.state = State.CLOSED
        self.refusal = facts.refusal
        self.pending: deque[int] = deque()
        """Tests that any worker may take, in order."""
        self.held: deque[int] = deque()
        """Tests that need VRAM, too: they are released one by one to the GPU workers."""
        self.elsewhere: set[int] = set()
        """Tests that need VRAM and come with a group of the GPU workers."""
        self.released: set[int] = set()
        """Tests released to GPU workers that have not begun."""
        self.was_used = False
        """Whether a test has begun since it was opened last."""
        self.in_vain = 0
        """How often it was opened and closed again without one."""
        self.places = facts.parallel
        """How many tests may be under way at once: other sessions may have some of them."""
        self.workers: dict[str, set[int]] = {}
        """The workers that hold a place, with the tests of the group that they have."""

    def has_place(self, worker: str) -> bool:
        """Whether a test of the group may start in this worker."""
        if worker in self.workers:
            return self.taken <= self.places
        return self.taken < self.places

    @property
    def is_refused(self) -> bool:
        """Whether its tests are reported without being run."""
        return self.refusal is not None

    def could_start(self, worker: str) -> bool:
        """Whether a test of it may be sent to this worker and start there."""
        return self.is_refused or (self.state is State.OPEN and self.has_place(worker))

    def take_back(self, test: int) -> None:
        """A test is over, or was not begun after all: it holds no place any more."""
        self.released.discard(test)
        for worker, tests in list(self.workers.items()):
            tests.discard(test)
            if not tests:
                del self.workers[worker]

    @property
    def taken(self) -> int:
        """How many places are taken."""
        return len(self.workers) + len(self.released)

    @property
    def is_used(self) -> bool:
        """Whether tests of it run, or are about to."""
        return bool(self.taken)


class ModelQueue:
    """The groups in the order in which their models are loaded."""

    def __init__(self, jobs: Sequence[Job], groups: Sequence[ModelGroup]) -> None:
        self.phase = BESIDE
        """Whether tests that use models run next to GPU tests, before or after them."""
        self.patience = 600.0
        """Seconds without progress of other sessions for which their VRAM is waited for."""
        self._jobs = jobs
        self.groups = [GroupState(facts) for facts in groups]
        self._chains: list[deque[int]] = []
        """Chains that no worker has."""
        self._chained: set[int] = set()
        """All tests that are in chains, also those that use no model."""
        self._own: dict[str, deque[int]] = {}
        """Worker -> what is left of its chain."""
        self.gate: dict[str, int] = {}
        """Worker -> the test of its chain that waits in it for its model."""
        self._wanted: set[int] = set()
        """Groups for which a GPU worker has a test that may not start yet."""

    # --- the tests ---

    def add(self, tests: Iterable[int]) -> None:
        """Tests that each worker may take by itself."""
        for test in tests:
            self._group(test).pending.append(test)

    def add_chain(self, tests: Sequence[int]) -> None:
        """Tests that stay together, some of which use a model."""
        self._chained.update(tests)
        self._chains.append(deque(tests))

    def hold(self, tests: Iterable[int]) -> None:
        """Tests that need VRAM, too."""
        for test in tests:
            self._group(test).held.append(test)

    def expect(self, tests: Iterable[int]) -> None:
        """Tests that GPU workers get with a group of theirs; each asks before it starts."""
        for test in tests:
            self._group(test).elsewhere.add(test)

    def expect_again(self, test: int) -> None:
        """One of those was not begun after all."""
        self._group(test).take_back(test)
        self.expect([test])

    def take_over(self, test: int) -> None:
        """A test that needs VRAM, too, and has to do without."""
        self.forget([test])
        self.add([test])

    def forget(self, tests: Iterable[int]) -> None:
        """Tests that nobody can run."""
        for test in tests:
            if group := self._group_of(test):
                group.elsewhere.discard(test)
                group.released.discard(test)

    def owns(self, test: int) -> bool:
        """Whether workers get this test from here alone."""
        return test in self._chained or (
            self._jobs[test].model is not None and not self._jobs[test].marked
        )

    def back(self, test: int) -> None:
        """A test that was not begun after all, or comes again."""
        job, group = self._jobs[test], self._group_of(test)
        if group is not None:
            group.take_back(test)
        if test not in self._chained:
            group = self._group(test)
            (group.held if job.marked else group.pending).appendleft(test)
            return
        same = (c for c in self._chains if job.group and self._jobs[c[0]].group == job.group)
        chain = next(same, None)
        if chain is None:
            self._chains.insert(0, deque([test]))
        else:
            chain.appendleft(test)

    @property
    def waits(self) -> bool:
        """Whether there are tests that no worker has."""
        return bool(
            self._chains
            or any(self._own.values())
            or any(group.pending or group.held for group in self.groups)
        )

    @property
    def workers_wanted(self) -> int:
        """How many workers could run such tests at once."""
        most = max((group.facts.parallel for group in self.groups), default=0)
        return most if self.waits else 0

    def take_unrunnable(self, could_run: Callable[..., bool]) -> list[int]:
        """Take out the tests that no worker can run; of chains that none can run as a whole, each
        test goes by itself. `could_run` says whether one worker could run these tests."""
        queues: list[deque[int]] = [*self._chains, *(g.pending for g in self.groups)]
        lost = [test for queue in queues for test in queue if not could_run(test)]
        for queue in queues:
            for test in [test for test in queue if test in lost]:
                queue.remove(test)
        self._chains = [
            deque(part)
            for chain in filter(None, self._chains)
            for part in ([chain] if could_run(*chain) else [[test] for test in chain])
        ]
        return lost

    def _group_of(self, test: int) -> GroupState | None:
        """That of a test; None where it uses no model."""
        number = self._jobs[test].model
        return None if number is None else self.groups[number]

    def _group(self, test: int) -> GroupState:
        group = self._group_of(test)
        assert group is not None
        return group

    # --- the workers ---

    def has_chain(self, worker: str) -> bool:
        """Whether this worker must be sent nothing else now."""
        return bool(self._own.get(worker)) or worker in self.gate

    def offer(self, worker: str, knows: Callable[..., bool]) -> Offer | None:
        """A test for a worker that has nothing to do, or asks for what follows its last one.

        `knows` says whether these tests are for this worker.
        """
        if worker in self.gate:
            return None
        if self._own.get(worker):
            return self._next_of_chain(worker)
        for group in self.groups:
            if not group.could_start(worker):
                continue
            test = next((test for test in group.pending if knows(test)), None)
            if test is not None:
                group.pending.remove(test)
                return self._given(worker, test)
        for chain in self._chains:
            if self._could_begin(worker, chain) and knows(*chain):
                self._chains.remove(chain)
                self._own[worker] = chain
                return self._next_of_chain(worker)
        return None

    def _first_use(self, chain: Iterable[int]) -> int | None:
        return next((test for test in chain if self._jobs[test].model is not None), None)

    def _could_begin(self, worker: str, chain: Iterable[int]) -> bool:
        first = self._first_use(chain)
        return first is None or self._group(first).could_start(worker)

    def _next_of_chain(self, worker: str) -> Offer:
        chain = self._own[worker]
        test = chain.popleft()
        if not chain:
            del self._own[worker]
        if self.may_start(worker, test):
            return self._given(worker, test)
        self.gate[worker] = test
        return Offer(test, admitted=False)

    def _given(self, worker: str, test: int) -> Offer:
        self.begin(worker, test)
        return Offer(test, refusal=self.refusal_of(test))

    def may_start(self, worker: str, test: int) -> bool:
        """Whether a test may start in this worker as far as its model goes."""
        group = self._group_of(test)
        return group is None or test in group.released or group.could_start(worker)

    def want(self, test: int) -> None:
        """A GPU worker could begin this test, were its model loaded."""
        model = self._jobs[test].model
        if model is not None and self.groups[model].state is State.CLOSED:
            self._wanted.add(model)

    def begin(self, worker: str, test: int) -> None:
        """A test is sent to a worker, and may start there."""
        group = self._group_of(test)
        if group is None:
            return
        self.forget([test])
        group.was_used = True
        if not group.is_refused:
            group.workers.setdefault(worker, set()).add(test)

    def open_gate(self) -> list[tuple[str, Offer]]:
        """The waiting tests that may start now, with their workers."""
        found = []
        for worker, test in list(self.gate.items()):
            if self.may_start(worker, test):
                del self.gate[worker]
                found.append((worker, self._given(worker, test)))
        return found

    def finished(self, worker: str, test: int) -> bool:
        """A test is over. Returns whether that changes what may start, or which model is next."""
        if self.gate.get(worker) == test:
            del self.gate[worker]
        group = self._group_of(test)
        if group is None:
            return worker in self.gate
        group.take_back(test)
        return True

    def down(self, worker: str) -> None:
        """A worker is gone; what it was sent comes back by `back`."""
        self.gate.pop(worker, None)
        for group in self.groups:
            group.workers.pop(worker, None)
        chain = self._own.pop(worker, None)
        if chain:
            self._chains.insert(0, chain)

    # --- the models ---

    @property
    def released(self) -> set[int]:
        """Tests released to GPU workers that have not begun."""
        return set().union(*(group.released for group in self.groups))

    def release(self) -> list[int]:
        """Tests that need VRAM, too, and that may start as far as their models go."""
        found = []
        for group in self.groups:
            while group.held and group.could_start(""):
                test = group.held.popleft()
                if not group.is_refused:
                    group.released.add(test)
                found.append(test)
        return found

    def refusal_of(self, test: int) -> tuple[str, str] | None:
        """Why a test is not run, as its model is not there."""
        group = self._group_of(test)
        return None if group is None else group.refusal

    def opened(self, number: int) -> None:
        """The model of this group is loaded."""
        if self.groups[number].state is State.OPENING:
            self.groups[number].state = State.OPEN
            self._wanted.discard(number)

    def not_opened(self, number: int, reason: str) -> None:
        """The model cannot be loaded: its tests fail."""
        self.groups[number].state = State.CLOSED
        self.groups[number].refusal = "fail", reason

    def closed(self, number: int) -> None:
        """Nothing keeps the model of this group any more."""
        if self.groups[number].state is State.CLOSING:
            self.groups[number].state = State.CLOSED

    def limit(self, number: int, places: int) -> bool:
        """Let so many tests of the group be under way at once. Returns whether that is new."""
        group, before = self.groups[number], self.groups[number].places
        group.places = min(places, group.facts.parallel)
        return group.places != before

    @property
    def has_offers(self) -> bool:
        """Whether a test could begin now, were there a worker for it."""
        return any(
            group.state is State.OPEN and group.pending and group.has_place("")
            for group in self.groups
        ) or any(self._could_begin("", chain) for chain in self._chains)

    @property
    def is_active(self) -> bool:
        """Whether tests that use models run, or are to come."""
        return self.waits or any(group.is_used for group in self.groups)

    def actions(
        self, bound: Iterable[int] = (), *, is_idle: bool = False, may_open: bool = True
    ) -> list[OpenModel | CloseModel]:
        """The models to load, and those that nothing uses any more.

        `bound`: tests that wait in GPU workers. `is_idle`: no worker runs anything, though each
        was offered what may start. `may_open`: whether it is time to load models.
        """
        startable = self._startable()
        blocked, wanted = self._waited_for()
        # In the order of binding: those that came first must not be passed by for long.
        models = [(number, self.groups[number]) for number in self._models_of(bound)]
        first = [n for n, group in models if not group.is_refused and group.state is State.CLOSED]
        blocked.update(first)
        wanted |= startable
        actions: list[OpenModel | CloseModel] = []
        for number, group in enumerate(self.groups):
            if group.state is not State.OPEN or group.is_used:
                continue
            if not group.places and self._is_left(number):
                # Another session's tests use it; it is to stay for those of this one.
                continue
            others = bool((wanted | blocked) - {number})
            # Where no test can use it now, and each worker waits for another one, it is closed.
            has_more = number in startable or bool(group.elsewhere)
            keeps_vram = bool(group.facts.reservations) and number not in startable
            is_replaced = others and (is_idle or not has_more)
            if not self._is_left(number) or is_replaced or (is_idle and keeps_vram):
                group.state = State.CLOSING
                group.in_vain += not group.was_used
                actions.append(CloseModel(number))
        # Each in turn where a model was loaded in vain: another test may be what it waits for.
        in_turn = dict.fromkeys([*first, *sorted(blocked), *sorted(wanted)])
        for number in sorted(in_turn, key=lambda number: self.groups[number].in_vain):
            group = self.groups[number]
            if may_open and all(each.state is State.CLOSED for each in self.groups):
                group.state = State.OPENING
                group.was_used = False
                actions.append(OpenModel(number))
        return actions

    def _startable(self) -> set[int]:
        """The groups of which a worker could begin a test now, were the model loaded."""
        found = {n for n, group in enumerate(self.groups) if group.pending or group.held}
        for chain in self._chains:
            found.update(self._models_of(chain)[:1])
        return {number for number in found if not self.groups[number].is_refused}

    def _waited_for(self) -> tuple[set[int], set[int]]:
        """The groups for which a worker waits, so that it does nothing else; and those of which
        GPU workers have asked for a test."""
        waiting = set(self._models_of(self.gate.values()))
        asked = {number for number in self._wanted if self.groups[number].elsewhere}
        missing = {n for n, group in enumerate(self.groups) if group.is_refused}
        return waiting - missing, asked - missing

    def _models_of(self, tests: Iterable[int]) -> list[int]:
        return [model for test in tests if (model := self._jobs[test].model) is not None]

    def _is_left(self, number: int) -> bool:
        """Whether tests of the group are still to come."""
        group = self.groups[number]
        chains = [*self._chains, *self._own.values(), self.gate.values()]
        return bool(group.pending or group.held or group.elsewhere) or any(
            number in self._models_of(chain) for chain in chains
        )
