"""What happened in a run, in order, for the summary and the report."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

MOST_EVENTS = 10_000
"""A run of days with a restless neighbour must not fill the memory."""


class Event(NamedTuple):
    """Something that happened beside the tests."""

    at: float
    """Seconds since the run started."""
    kind: str
    """Such as `ollama-spilled`; the reference of the report lists them."""
    text: str
    """One sentence for a person."""
    facts: Mapping[str, Any] = {}
    """The figures in it, in builtin types; sizes in bytes."""


class Record:
    """The events of one run; any thread may add to it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        """The monotonic clock, in seconds."""
        self._began = clock()
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._listeners: list[Callable[[Event], object]] = []
        self.began_at = time.time()
        """Seconds since the epoch at which the run started."""
        self.dropped = 0
        """Events beyond `MOST_EVENTS`, which were not kept."""

    def now(self) -> float:
        """Seconds since the run started."""
        return self.clock() - self._began

    def since_start(self, moment: float) -> float:
        """A moment on the monotonic clock, in seconds since the run started."""
        return max(0.0, moment - self._began)

    def note(self, kind: str, text: str, **facts: Any) -> Event:
        """Keep an event, with the time at which it was noted."""
        event = Event(self.now(), kind, text, facts)
        with self._lock:
            if len(self._events) < MOST_EVENTS:
                self._events.append(event)
            else:
                self.dropped += 1
        for listener in self._listeners:
            # A failing listener must not disturb the code that notes an event.
            with contextlib.suppress(Exception):
                listener(event)
        return event

    def listen(self, listener: Callable[[Event], object]) -> None:
        """Receive each event at once, in the thread that notes it."""
        self._listeners.append(listener)

    def events(self, *kinds: str) -> list[Event]:
        """The events of these kinds, or all, in the order in which they were noted."""
        with self._lock:
            return [event for event in self._events if not kinds or event.kind in kinds]
