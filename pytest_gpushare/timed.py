"""Calls with a time limit; one that hangs is left behind in a daemon thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

_MOST_STARVED = 30.0
"""Seconds for which a call that waits for a CPU is waited for, beyond its limit."""


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
        self._caller = threading.get_native_id()
        self._waited_before = _waited((self._caller,))
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

    def wait_until(self, end: float) -> bool:
        """Wait until then, on the monotonic clock, and longer by the time for which the system
        let neither this thread nor the call run: on a busy machine that is not the call's fault.
        """
        self.wait(end - time.monotonic())
        while not self.is_over:
            more = end + min(self._starved(), _MOST_STARVED) - time.monotonic()
            if more <= 0:
                break
            self.wait(max(more, 0.01))
        return self.is_over

    def _starved(self) -> float:
        """Seconds for which the threads were ready to run, and waited for a CPU."""
        return max(0.0, _waited((self._caller, self._thread.native_id)) - self._waited_before)

    def result(self) -> T:
        """What the call returned. Raises what it raised, or `TimeoutError` while it runs."""
        if not self.is_over:
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]


def _waited(threads: Iterable[int | None]) -> float:
    """Seconds for which these threads have waited for a CPU; 0 where the system does not say."""
    total = 0
    for thread in threads:
        with contextlib.suppress(OSError, ValueError, IndexError):
            line = Path(f"/proc/self/task/{thread}/schedstat").read_text(encoding="ascii")
            total += int(line.split()[1])
    return total / 1e9


def call_within(seconds: float, call: Callable[[], T], name: str = "call") -> T | None:
    """What the call returns; None where it raises, or takes longer than so many seconds."""
    timed = TimedCall(call, name)
    timed.wait(seconds)
    return timed.value
