"""Nudges the run while tests wait for VRAM, as no worker says anything then."""

from __future__ import annotations

import threading
from collections.abc import Callable

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
