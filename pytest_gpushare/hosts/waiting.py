"""The wait for VRAM of a run on several hosts: until one of them has room for a GPU worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.hosts.asking import AskedHost
from pytest_gpushare.hosts.part import plan_there
from pytest_gpushare.leases.lessee import EnoughElsewhereError, WaitingLine
from pytest_gpushare.session.start_facts import StartFacts

_LOOK = 0.05
"""Seconds for which one host is listened to."""

StartHere = Callable[[Settings, WaitingLine], StartFacts]


class StartOfHosts:
    """The hosts of a run, while it is looked for one that has room. This host is one of them."""

    def __init__(self, settings: Settings, start_here: StartHere | None) -> None:
        """`start_here` probes and plans on this host; None: it takes no part."""
        self._settings, self._start_here = settings, start_here
        self.here: StartFacts | None = None
        """What was found on this host."""

    def look_here(self) -> None:
        """Probe this host, and do not wait for VRAM: others may have some."""
        if self._start_here is not None:
            at_once = replace(self._settings, wait=Fraction(0))
            found = self._start_here(at_once, WaitingLine())
            # Its tests may wait.
            self.here = found._replace(settings=self._settings)

    def close(self) -> None:
        """Give back what this host has leased."""
        if self.here is not None:
            self.here.close()

    def await_room(self, hosts: Sequence[AskedHost]) -> None:
        """Wait, as `gpu_share_wait` says, until one host has room, or none waits any more."""
        if self._has_room(hosts):
            return
        line = _LineOfAll(hosts, lambda: self._has_room(hosts))
        try:
            if self.here is not None and self._start_here is not None:
                self._wait_here(self._start_here, line)
            while any(host.answer is None for host in hosts) and not self._has_room(hosts):
                line.look()
                line.show("")
        except EnoughElsewhereError:
            pass
        finally:
            line.clear()

    def _wait_here(self, start_here: StartHere, line: WaitingLine) -> None:
        self.close()
        self.here = None
        try:
            self.here = start_here(self._settings, line)
        except EnoughElsewhereError:
            self.look_here()
            raise

    def _has_room(self, hosts: Sequence[AskedHost]) -> bool:
        here = self.here is not None and bool(self.here.plan.slots)
        return here or any(
            host.facts is not None and bool(plan_there(self._settings, host.facts).slots)
            for host in hosts
        )


class _LineOfAll(WaitingLine):
    """Says on what the run waits; it is over as soon as one host has room."""

    def __init__(self, hosts: Sequence[AskedHost], has_room: Callable[[], bool]) -> None:
        super().__init__()
        self._hosts, self._has_room = hosts, has_room

    def look(self, limit: float = _LOOK) -> None:
        """Take what the hosts say. Raises `HostError`, and `EnoughElsewhereError`."""
        for host in self._hosts:
            if host.answer is None:
                while host.hear(time.monotonic() + limit) and host.answer is None:
                    pass
        if self._has_room():
            raise EnoughElsewhereError

    def show(self, text: str, hint: str = "") -> None:
        """See `WaitingLine`."""
        self.look(0.0)
        waits = [f"host {host.name}: {host.waits}" for host in self._hosts if not host.answer]
        if text or waits:
            super().show(text or f"gpu-share: {waits[0]}", hint)
