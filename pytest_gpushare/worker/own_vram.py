"""What this process holds on its device by NVML, for tests that no framework counts.

It is read at the end of a test's call, before its teardown, and when a test has run out of memory.
A process list takes milliseconds under a lock of the driver, so all workers of a device together
read no more than 20 a second; tests in between stay without a figure.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pytest_gpushare.worker import counters

if TYPE_CHECKING:
    from pytest_gpushare.gpu.readings import LiveVram
    from pytest_gpushare.wire import Link

PER_SECOND, URGENT_PER_SECOND = 16, 4
"""Readings of a device by all its workers together: at the end of calls, and of tests that ran out
of memory."""

PAUSE_WITHOUT_VRAM = 0.25
"""Seconds to the next reading at least while the process holds nothing: most tests use no GPU."""

PATIENCE = 0.5
"""Seconds that a test may be delayed by a driver that does not answer: once in this process, as
nobody waits again until it has answered."""

_SELF = "self"
_MOST_BYTES = 64 * 1024
_WALL = 0x40000000
"""Linux's `__WALL`: children that end with another signal than SIGCHLD count, too."""


class OwnVram:
    """Reads this process and its descendants on one device, and sends what they hold."""

    def __init__(
        self,
        device: str,
        workers: int,
        link: Link,
        *,
        live: LiveVram | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`device` is a UUID, `workers` how many there are on it; `live` is for tests."""
        self._device, self._link, self._live, self._clock = device, link, live, clock
        self._pid = os.getpid()
        self._pause = {False: workers / PER_SECOND, True: workers / URGENT_PER_SECOND}
        self._next = dict.fromkeys(self._pause, float("-inf"))

    def prepare(self) -> None:
        """Before a test: open the driver's library, where no framework is there that would count.

        Not while the test runs, which may fork, or look at the threads of its process.
        """
        if self._live is None and not counters.may_count():
            # Where no thread can be started, the first reading opens it.
            with contextlib.suppress(RuntimeError):
                self._open().processes(0.0)

    def look(self, nodeid: str, *, urgent: bool = False) -> None:
        """Send what is held now as a lower bound of this test's peak; `urgent`: it ran out.

        Nothing is read where a framework counts, or where the last reading was too short ago.
        """
        now = self._clock()
        # A forked child has no thread that reads.
        if now < self._next[urgent] or os.getpid() != self._pid or counters.counts() is not None:
            return
        size = self._read()
        pause = self._pause[urgent]
        self._next[urgent] = now + (pause if size else max(pause, PAUSE_WITHOUT_VRAM))
        if size:
            self._link.send("own", {"nodeid": nodeid, "held": size, "at": time.time()})

    def _open(self) -> LiveVram:
        # Imported by the first test that may end without a framework's counters.
        from pytest_gpushare.gpu.readings import LiveVram
        from pytest_gpushare.gpu.vendors import OneDevice

        self._live = LiveVram(OneDevice(self._device), timeout=PATIENCE)
        return self._live

    def _read(self) -> int | None:
        """Bytes; None where the driver does not say in time."""
        from pytest_gpushare.gpu.attribution import Attribution

        live = self._live or self._open()
        asked = time.monotonic()
        reading = live.processes(0.0)
        if reading.at < asked:
            return None
        split = Attribution().split(reading.devices.get(self._device), {self._pid: _SELF})
        return None if split is None else split.workers.get(_SELF)


def own_children() -> frozenset[int]:
    """PIDs of the processes that this one has started and that live; empty where unknown."""
    found: set[int] = set()
    if not _has_children():
        return frozenset()
    # Threads and processes come and go meanwhile.
    with contextlib.suppress(OSError, ValueError):
        for thread in os.listdir("/proc/self/task"):  # noqa: PTH208
            with open(f"/proc/self/task/{thread}/children", "rb") as file:  # noqa: PTH123
                found.update(map(int, file.read(_MOST_BYTES).split()))
    return frozenset(found)


def _has_children() -> bool:
    """Whether there are any, by one system call; True where that is unknown."""
    if sys.platform != "linux":
        return True
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT | _WALL
    try:
        os.waitid(os.P_ALL, 0, options)
    except ChildProcessError:
        return False
    except OSError:
        # Older kernels know `_WALL` only elsewhere.
        return True
    return True


def reaped() -> object:
    """What differs once a process that this one has started is over; always None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime, used.ru_stime, used.ru_minflt
