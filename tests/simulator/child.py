"""Child processes that do not outlive the block that started them, whatever goes wrong in it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

LIMIT = 60.0
"""Seconds that a child process is waited for, where nothing else is said."""


@contextlib.contextmanager
def child_process(
    command: Sequence[str], *, limit: float = LIMIT, **options: Any
) -> Iterator[subprocess.Popen[Any]]:
    """Run *command* beside the block, with the *options* of `subprocess.Popen`.

    At the end of the block its pipes are closed, and it has *limit* seconds to end by itself.
    After that, and at once where the block failed, it is killed, with its process group if it
    has one of its own. Ctrl-C reaches it also where this process ignores SIGINT.
    """
    process = start_child(command, **options)
    try:
        yield process
        _close_pipes(process)
        process.wait(limit)
    finally:
        if options.get("start_new_session"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if process.poll() is None:
            process.kill()
        _close_pipes(process)
        process.wait(limit)


def start_child(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start *command* so that it can be interrupted, also where this process ignores SIGINT.

    A shell starts its background jobs so (``nohup pytest &``), and an ignored signal stays
    ignored in every child process.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        return subprocess.Popen(command, **options)
    # A handler, unlike "ignore", does not pass on to the program that is started.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, **options)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def wait_for(condition: Callable[[], object], seconds: float = LIMIT, message: str = "") -> None:
    """Wait until *condition* holds, which it must within so many *seconds*."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, message or "it did not happen"
        time.sleep(0.01)


def _close_pipes(process: subprocess.Popen[Any]) -> None:
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            # Whoever reads what is left in the buffer may be gone.
            with contextlib.suppress(OSError):
                pipe.close()
