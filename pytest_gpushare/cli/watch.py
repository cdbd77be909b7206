"""`pytest-gpushare watch`: snapshots of devices, sessions and Ollama, until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pytest_gpushare.cli.terminal import OK, screen, show, write_lines
from pytest_gpushare.cli.watch_view import Snapshot, Watcher, document, lines, rows
from pytest_gpushare.config.settings import Settings

Show = Callable[[Snapshot], None]


def watch(options: argparse.Namespace) -> int:
    """Show snapshots until Ctrl-C. Returns the exit code; Ctrl-C is no error."""
    with _terminable(), contextlib.suppress(KeyboardInterrupt):
        watcher = Watcher(_settings())
        try:
            with _output(options) as show_snapshot:
                _loop(watcher, show_snapshot, options)
        finally:
            watcher.close()
    return OK


def _loop(watcher: Watcher, show_snapshot: Show, options: argparse.Namespace) -> None:
    due = time.monotonic()
    while True:
        show_snapshot(watcher.snapshot(options.interval / 2))
        if options.once:
            return
        due = max(due + options.interval, time.monotonic() + 0.05)
        time.sleep(due - time.monotonic())


@contextmanager
def _output(options: argparse.Namespace) -> Iterator[Show]:
    """How a snapshot is shown: as JSON, redrawn in a terminal, or as lines."""
    if options.json:
        yield lambda snapshot: write_lines([json.dumps(document(snapshot))])
        return
    if not sys.stdout.isatty():
        yield lambda snapshot: write_lines(lines(snapshot))
        return
    if options.once:
        yield lambda snapshot: show(rows(snapshot, 80))
        return
    with screen() as drawn:
        if drawn is None:
            # The terminal cannot be redrawn, as with TERM=dumb.
            yield lambda snapshot: write_lines(lines(snapshot))
        else:
            yield lambda snapshot: drawn(lambda width: rows(snapshot, width))


def _settings() -> Settings:
    """The project's settings, for Ollama's address; the defaults where they cannot be read."""
    from pytest_gpushare.cli.doctor.examine import ask, settings_of

    return settings_of(ask(()))[0]


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, so that the terminal is restored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
