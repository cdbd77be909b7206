"""The need of the running test, raised by what it acquires while it runs (`leases.acquire`)."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pytest_gpushare.leases import DEFAULT_WAIT, LeaseUnavailable
from pytest_gpushare.units import format_gb

_ANSWER_WITHIN = 10.0
"""Seconds for the controller's first answer."""


class RaisedNeed:
    """Asks the controller, which waits for tests of this run and of other sessions."""

    def __init__(
        self,
        on: Callable[[str, Callable[[Any], None]], object],
        ask: Callable[[int, int, bool], object],
    ) -> None:
        """`on` receives messages of a kind from the controller; `ask` sends it the number of a
        question, the bytes that are wanted, and whether less would do."""
        self._ask = ask
        self._answers: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()
        self._number = self._total = 0
        on("raised", self._answers.put)

    @contextlib.contextmanager
    def __call__(self, size: int, wait: float | None) -> Iterator[None]:
        """Have `size` bytes in this worker, with what blocks around this one have."""
        __tracebackhide__ = True
        self._raise_to(self._total + size, DEFAULT_WAIT if wait is None else wait)
        self._total += size
        try:
            yield
        finally:
            self._total -= size
            self._lower()

    def _raise_to(self, size: int, wait: float) -> None:
        __tracebackhide__ = True
        self._number += 1
        self._ask(self._number, size, False)
        asked, why = time.monotonic(), ""
        while True:
            # The controller says at once what is in the way.
            until = asked + (wait if why else max(wait, _ANSWER_WITHIN))
            try:
                answer = self._answers.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if answer["number"] != self._number:
                continue
            if answer["granted"]:
                return
            why = answer["text"]
            if answer["is_final"]:
                break
        self._lower()
        waited = time.monotonic() - asked
        after = f" after {waited:.0f} s" if waited >= 1 else ""
        raise LeaseUnavailable(
            f"{format_gb(size)} of VRAM are not available for this test{after}"
            f"{': ' * bool(why)}{why}"
        )

    def _lower(self) -> None:
        self._number += 1
        self._ask(self._number, self._total, False)

    def most(self, size: int) -> int:
        """Have so many bytes until the test ends, or as many as are there; returns how many."""
        self._number += 1
        self._ask(self._number, size, True)
        until = time.monotonic() + _ANSWER_WITHIN
        with contextlib.suppress(queue.Empty):
            while True:
                answer = self._answers.get(timeout=max(0.0, until - time.monotonic()))
                if answer["number"] == self._number:
                    return min(size, int(answer["size"]))
        return size
