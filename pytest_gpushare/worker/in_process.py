"""Leases of a process that runs the tests itself: by the test, not by the run."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Mapping
from functools import partial
from typing import Any

import pytest

from pytest_gpushare.leases.claims import Naming
from pytest_gpushare.leases.ledger import LedgerError
from pytest_gpushare.leases.lessee import Lessee, View, WaitingLine, Wish
from pytest_gpushare.leases.records import DeviceLease
from pytest_gpushare.planning.plan import Plan
from pytest_gpushare.units import format_gb


class LeasePerTest:
    """Leases what each test needs for as long as it runs, in a process without workers."""

    def __init__(
        self, lessee: Lessee, plan: Plan, tests: Mapping[str, Any], wait: float | None
    ) -> None:
        """`tests` is what a worker would receive about its tests."""
        from pytest_gpushare.worker.collection import MarkerReader

        self._lessee, self._wait = lessee, wait
        self._slot = plan.slots[0]
        self._device = next(d for d in plan.devices if d.device == self._slot.device)
        self._reader = MarkerReader(tests)
        self._is_explained = False

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, Any, Any]:
        """Give back what the test had."""
        try:
            return (yield)
        finally:
            self._lessee.shrink({})

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Wait for the VRAM of the test; it fails where other sessions do not give it."""
        need = self._reader.wanted(item)[1].need
        size = self._slot.vram if need is None or need.vram is None else need.vram
        if not size:
            return
        line = WaitingLine()
        uuid = self._slot.device.uuid

        def report(view: View, waited: float) -> None:
            line.show(
                f"gpu-share: {item.nodeid} waits for {format_gb(size)} of VRAM, {waited:.0f} s: "
                f"{_holders(view, uuid)}"
            )

        try:
            outcome = self._lessee.claim(partial(self._decide, size), self._wait, report)
        except LedgerError:
            # Without the ledger the test runs as it would alone.
            return
        finally:
            line.clear()
        if not outcome.is_granted and self._is_explained:
            pytest.fail(
                f"{format_gb(size)} of VRAM are leased by other sessions, waited "
                f"{outcome.waited:.0f} s: {_holders(outcome.view, uuid)}",
                pytrace=False,
            )

    def _decide(self, size: int, view: View) -> Wish:
        device, claims = self._slot.device, view.claims[self._slot.device.uuid]
        memory = (view.memory or {}).get(device.uuid)
        free = device.free if memory is None else memory.free
        processes = view.processes.get(device.uuid) or ()
        own = sum(process.used or 0 for process in processes if process.pid == os.getpid())
        room = free - self._device.outstanding - self._device.safety_buffer - claims.leased
        # Where no other session claims anything, nobody reads what this process holds already.
        is_alone = not claims.holders and not claims.waiting
        fits = is_alone or size - own <= room - claims.ahead(room, view.ticket)
        others = claims.leased + sum(holder.held or 0 for holder in claims.holders)
        self._is_explained = bool(claims.holders) and size - own <= room + others
        share = DeviceLease(size if fits else 0, 0 if fits else size, self._device.reservation)
        return Wish({device.uuid: share}, self._is_explained)


def _holders(view: View, uuid: str) -> str:
    found = view.claims[uuid].holders
    return "; ".join(Naming().holder(holder, time.time()) for holder in found) or "nobody"
