"""Calls with a time limit; one that hangs is left behind in a daemon thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class TimedCall(Generic[T]):
    """A call that runs in a daemon thread from the moment this object is made.

    The caller waits as long as it likes; what the call returns or raises is kept. An exception
    never leaves the thread: pytest reports those as errors of a test.
    """

    def __init__(self, call: Callable[[], T], name: str = "call") -> None:
        """`name` stands in the name of the thread."""
        self._call = call
        self._value: T | None = None
        self._error: Exception | None = None
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"gpu-share-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except Exception as error:
            self._error = error

    @property
    def is_over(self) -> bool:
        """Whether the call has returned or raised."""
        return not self._thread.is_alive()

    @property
    def seconds(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self._began

    @property
    def value(self) -> T | None:
        """What the call returned; None while it runs, and where it raised."""
        return self._value

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the call, at most so many seconds. Returns `is_over`."""
        self._thread.join(max(0.0, seconds))
        return self.is_over

    def result(self) -> T:
        """What the call returned. Raises what it raised, or `TimeoutError` while it runs."""
        if not self.is_over:
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


def call_within(seconds: float, call: Callable[[], T], name: str = "call") -> T | None:
    """What the call returns; None where it raises, or takes longer than so many seconds."""
    timed = TimedCall(call, name)
    timed.wait(seconds)
    return timed.value
