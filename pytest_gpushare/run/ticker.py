"""Nudges the run while tests wait for VRAM, as no worker says anything then."""

from __future__ import annotations

import threading
from collections.abc import Callable

PAUSE = 0.025
"""Seconds between two nudges."""


class Ticker:
    """A service that calls `nudge` from a thread of its own while `waits` says so."""

    def __init__(self, waits: Callable[[], bool], nudge: Callable[[], None]) -> None:
        self._waits = waits
        self._nudge = nudge
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-share-ticker", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Nudge no more."""
        self._stop.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        while not self._stop.wait(PAUSE):
            if self._waits():
                self._nudge()
