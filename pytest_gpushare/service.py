"""What runs beside the tests, and ends with them or at SIGTERM."""

from __future__ import annotations

import signal
import threading
from typing import Any, Generic, Protocol, TypeVar


class Service(Protocol):
    """Something that runs beside the tests, from before the first to after the last."""

    def start(self) -> None:
        """Begin; threads are daemons."""

    def stop(self) -> None:
        """End within a second or so, and leave nothing behind."""


S = TypeVar("S", bound=Service)


class AtSigterm(Generic[S]):
    """A service that is stopped by SIGTERM, too, by which pytest would end at once."""

    def __init__(self, service: S) -> None:
        self.service = service
        self._before: Any = None
        """The handler before; None where there is none of ours."""

    def start(self) -> None:
        """Start the service, and handle the signal unless somebody else does; harmless twice."""
        self.service.start()
        if self._before is not None or threading.current_thread() is not threading.main_thread():
            return
        found = signal.getsignal(signal.SIGTERM)
        if found is signal.SIG_DFL or isinstance(getattr(found, "__self__", None), AtSigterm):
            self._before = found
            signal.signal(signal.SIGTERM, self._end)

    def stop(self) -> None:
        """Stop the service, and leave the signal to whoever had it; harmless twice."""
        if self._before is not None and signal.getsignal(signal.SIGTERM) == self._end:
            signal.signal(signal.SIGTERM, self._before)
        self.service.stop()

    def _end(self, number: int, _frame: object) -> None:
        self.service.stop()
        signal.signal(number, self._before)
        signal.raise_signal(number)
