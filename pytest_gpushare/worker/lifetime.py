"""How long a worker lives: no longer than its controller, and as long as its session's lease."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_gpushare.leases.locks import keep_alive

if TYPE_CHECKING:
    from pytest_gpushare.wire import Link

GRACE = 0.4
"""Seconds between the end of the controller and that of a worker which would go on."""

_POLL = 0.05


def live_with(config: pytest.Config, record: str, link: Link) -> None:
    """Keep the session's record alive, and end when the controller was killed.

    Without this, workers go on for up to 15 s after their controller was killed, and nobody
    could say how much of the VRAM that they may still take is free.
    """
    member = _Member()
    member.join(record)
    config.add_cleanup(member.leave)
    link.on("lease", member.join)
    parent = os.getppid()
    link.on("closed", lambda _: _end_if_orphaned(parent))


class _Member:
    """This process's part in the record."""

    def __init__(self) -> None:
        self._give_up: Callable[[], None] | None = None

    def join(self, record: str) -> None:
        """Keep this record alive, and no earlier one."""
        self.leave()
        # A record that was removed meanwhile is replaced by another one, which is announced.
        with contextlib.suppress(OSError):
            self._give_up = keep_alive(Path(record))

    def leave(self) -> None:
        give_up, self._give_up = self._give_up, None
        if give_up is not None:
            give_up()


def _end_if_orphaned(parent: int) -> None:
    """The channel is closed: at the end of a run, or as the controller has died."""
    if hasattr(os, "getuid"):
        threading.Thread(target=_end, args=(parent,), name="gpu-share-orphan", daemon=True).start()


def _end(parent: int) -> None:
    until = time.monotonic() + GRACE
    while os.getppid() == parent and time.monotonic() < until:
        time.sleep(_POLL)
    if os.getppid() == parent:
        return
    time.sleep(max(0.0, until - time.monotonic()))
    # No time for fixtures: execnet, too, ends such a worker by a signal, only later.
    os._exit(1)
