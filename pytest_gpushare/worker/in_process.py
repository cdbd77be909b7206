"""A process that runs the tests itself: what the controller and the dispatch do for workers.

It leases VRAM by the test, not by the run, and has each model of Ollama's loaded in time.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpushare.leases import LeaseUnavailable, set_need_hooks
from pytest_gpushare.leases.claims import Naming
from pytest_gpushare.leases.ledger import LedgerError
from pytest_gpushare.leases.lessee import Lessee, View, Wish
from pytest_gpushare.leases.records import DeviceLease
from pytest_gpushare.planning.plan import Plan
from pytest_gpushare.units import format_gb
from pytest_gpushare.waiting_line import WaitingLine
from pytest_gpushare.wire import ITSELF, Link
from pytest_gpushare.worker.collection import REFUSAL, MarkerReader, may_use_models
from pytest_gpushare.worker.plugin import register_plugins

if TYPE_CHECKING:
    from pytest_gpushare.session.llm import LlmTests
    from pytest_gpushare.session.run import ActiveRun


def begin_in_process(run: ActiveRun, config: pytest.Config, message: Mapping[str, Any]) -> None:
    """Do in this process what a worker does with such a message, and lease by the test."""
    link = Link(partial(run.links.receive, ITSELF))
    run.links.attach(ITSELF, link.receive)
    run.joined(ITSELF, message)
    plugins, tests = config.pluginmanager, message["tests"]
    plugins.register(ModelsInProcess(run, tests), "gpu-share-models")
    register_plugins(config, message, link)
    if run.lessee is not None and run.lessee.claims_devices and run.plan.slots:
        wait = None if run.settings.wait is None else float(run.settings.wait)
        leases = LeasePerTest(run.lessee, run.plan, tests, wait, run.tests.waited)
        plugins.register(leases, "gpu-share-lease-per-test")
        config.add_cleanup(partial(set_need_hooks, None))


class LeasePerTest:
    """Leases what each test needs for as long as it runs, in a process without workers."""

    def __init__(
        self,
        lessee: Lessee,
        plan: Plan,
        tests: Mapping[str, Any],
        wait: float | None,
        waited: Callable[[str, float], object],
    ) -> None:
        """`tests` is what a worker would receive about its tests.

        `waited` is called with the node id of each test and the seconds that it waited.
        """
        self._lessee, self._wait, self._waited = lessee, wait, waited
        self._slot = plan.slots[0]
        self._device = next(d for d in plan.devices if d.device == self._slot.device)
        self._reader = MarkerReader(tests)
        self._is_explained = False
        self._need = self._acquired = 0
        """Bytes that the running test has by its need, and by what it acquired."""
        set_need_hooks(self.raised)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, Any, Any]:
        """Give back what the test had."""
        try:
            return (yield)
        finally:
            self._need = 0
            # What a fixture of a wider scope has acquired, the next tests have.
            self._lessee.shrink({self._slot.device.uuid: self._acquired})

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Wait for the VRAM of the test; it fails where other sessions do not give it."""
        need = self._reader.wanted(item)[1].need
        size = self._slot.vram if need is None or need.vram is None else need.vram
        if not size:
            return
        self._need = size
        refused, waited = self._lease(max(size, self._acquired), item.nodeid, self._wait)
        self._waited(item.nodeid, waited)
        if refused and self._is_explained:
            pytest.fail(
                f"{format_gb(size)} of VRAM is leased by other sessions, {refused}", pytrace=False
            )

    @contextlib.contextmanager
    def raised(self, size: int, wait: float | None) -> Iterator[None]:
        """Have so many bytes within a block, with what blocks around it have; or fail."""
        before = self._acquired
        # It has started: how long it waits now is part of its time.
        refused, _ = self._lease(max(before + size, self._need), "a test", wait)
        if refused:
            raise LeaseUnavailable(f"{format_gb(size)} of VRAM is not available, {refused}")
        self._acquired = before + size
        try:
            yield
        finally:
            self._acquired = before
            self._lessee.shrink({self._slot.device.uuid: max(before, self._need)})

    def _lease(self, size: int, name: str, wait: float | None) -> tuple[str, float]:
        """Lease so much in all; returns what is said where that cannot be had, else nothing, and
        the seconds that it took."""
        line = WaitingLine()
        uuid = self._slot.device.uuid

        def report(view: View, waited: float) -> None:
            line.show(
                f"gpu-share: {name} waits for {format_gb(size)} of VRAM, {waited:.0f} s: "
                f"{_holders(view, uuid)}"
            )

        try:
            outcome = self._lessee.claim(partial(self._decide, size), wait, report)
        except LedgerError:
            # Without the ledger the test runs as it would alone.
            return "", 0.0
        finally:
            line.clear()
        if outcome.is_granted:
            return "", outcome.waited
        why = f"waited {outcome.waited:.0f} s: {_holders(outcome.view, uuid)}"
        return why, outcome.waited

    def _decide(self, size: int, view: View) -> Wish:
        device, claims = self._slot.device, view.claims[self._slot.device.uuid]
        memory = view.memory.get(device.uuid)
        free = device.free if memory is None else memory.free
        processes = view.processes.get(device.uuid) or ()
        own = sum(process.used or 0 for process in processes if process.pid == os.getpid())
        room = free - self._device.outstanding - self._device.safety_buffer - claims.leased
        # Where no other session claims anything, nobody reads what this process holds already.
        is_alone = not claims.holders and not claims.waiting
        fits = is_alone or size - own <= room - claims.ahead(
            room, view.ticket, reserved=self._device.reservation
        )
        others = claims.leased + claims.held
        self._is_explained = bool(claims.holders) and size - own <= room + others
        has = self._lessee.record.lease(device.uuid).lease
        share = DeviceLease(max(size, has)) if fits else DeviceLease(has, max(0, size - has))
        share = share._replace(reserved=self._device.own_reservation)
        return Wish({device.uuid: share}, self._is_explained, granted=fits)


def _holders(view: View, uuid: str) -> str:
    return Naming().holders(view.claims[uuid], time.time()) or "no other session"


class ModelsInProcess:
    """Loads the model of each test before its protocol begins, outside of its time-out."""

    def __init__(self, run: ActiveRun, message: dict[str, Any]) -> None:
        """`message` is what a worker would receive about its tests."""
        self._run = run
        self._reader = MarkerReader(message)
        self._message = message["ollama"]
        self._llm: LlmTests | None = None
        self._groups: dict[pytest.Item, int] = {}
        self._left: Counter[int] = Counter()
        """Group -> how many of its tests are to come."""
        self._refusals: dict[int, tuple[str, str]] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Bring tests of one model together, where there are several: each switch is a load.

        Only tests that use models change their places, among themselves.
        """
        if not may_use_models(self._message, items):
            return
        found = {at: self._reader.model_of(item) for at, item in enumerate(items)}
        uses = {at: use for at, use in found.items() if use is not None}
        if not uses:
            return
        from pytest_gpushare.service import AtSigterm
        from pytest_gpushare.session.llm import LlmTests

        self._llm = self._run.llm = LlmTests(self._run, uses, {}, [item.nodeid for item in items])
        self._run.services.add(AtSigterm(self._llm))
        self._groups = {items[at]: group for at, group in self._llm.of.items()}
        self._left.update(self._groups.values())
        if len(self._llm.groups) > 1:
            places = sorted(uses)
            ordered = sorted((items[at] for at in places), key=self._groups.__getitem__)
            for at, item in zip(places, ordered, strict=True):
                items[at] = item

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Have the model loaded first; where that fails, the test is reported with the reason."""
        group, llm = self._groups.get(item), self._llm
        if group is None or llm is None:
            return (yield)
        refusal = llm.groups[group].refusal or self._refusals.get(group)
        if refusal is None:
            began = time.monotonic()
            problem = llm.open_now(group)
            self._run.tests.waited(item.nodeid, time.monotonic() - began)
            if problem:
                refusal = self._refusals[group] = "fail", problem
        if refusal is not None:
            item.stash[REFUSAL] = refusal
        try:
            return (yield)
        finally:
            self._left[group] -= 1
            if not self._left[group]:
                llm.close_now(group)
