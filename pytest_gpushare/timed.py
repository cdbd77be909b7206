"""Calls with a limit of time; one that hangs is left behind in a daemon thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def bounded(call: Callable[[], T], seconds: float) -> T | None:
    """What the call gives; None where it fails, or takes longer than this."""
    answers: list[T] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            answers.append(call())

    thread = threading.Thread(target=run, name="gpu-share-bounded", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None
