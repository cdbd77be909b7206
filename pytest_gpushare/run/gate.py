"""The gate of a worker: between two tests it can be asked to rest while another is alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Gate:
    """Keeps the next test back while another worker has the device to itself.

    The main thread enters before a test and leaves after it; requests come in the thread that
    receives. Whatever is done at rest is done with the lock held, so no test starts meanwhile.
    """

    def __init__(
        self, send: Callable[[str, Any], object], give_back: Callable[[], int | None]
    ) -> None:
        self._send = send
        self._give_back = give_back
        """Empties caches; returns the bytes that are held still, None where unknown."""
        self._changed = threading.Condition()
        self._running = False
        self._pause: int | None = None
        """The number of the request to rest; None: tests may run."""
        self._open_for_good = False

    def enter(self) -> None:
        """Before a test: wait while the device is another's."""
        with self._changed:
            self._changed.wait_for(lambda: self._pause is None or self._open_for_good)
            self._running = True

    def leave(self) -> None:
        """After a test: obey what was asked for meanwhile."""
        with self._changed:
            self._running = False
            if self._pause is not None:
                self._rest()

    def pause(self, number: int) -> None:
        """Rest from the end of the running test on, and say so under this number."""
        with self._changed:
            self._pause = number
            if not self._running:
                self._rest()

    def resume(self, number: int) -> None:
        """Go on, if the request to rest was this one."""
        with self._changed:
            if self._pause == number:
                self._pause = None
                self._changed.notify_all()

    def open(self, _payload: object = None) -> None:
        """The controller is gone: nobody would ever say when to go on."""
        with self._changed:
            self._open_for_good = True
            self._changed.notify_all()

    def _rest(self) -> None:
        self._send("quiet", {"number": self._pause, "held": self._give_back()})
