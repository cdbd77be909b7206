"""`pytest-gpushare watch`: pictures, one after the other, until Ctrl-C."""

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

from pytest_gpushare.cli.terminal import OK, can_show, encodable, screen, show
from pytest_gpushare.cli.watch_view import Picture, Watcher, document, lines, rows
from pytest_gpushare.config.settings import Settings

Show = Callable[[Picture], None]


def watch(options: argparse.Namespace) -> int:
    """Show pictures; Ctrl-C is the way to end it, so it ends well."""
    with _terminable(), contextlib.suppress(KeyboardInterrupt):
        watcher = Watcher(_settings())
        try:
            with _output(options) as show_picture:
                _loop(watcher, show_picture, options)
        finally:
            watcher.close()
    return OK


def _loop(watcher: Watcher, show_picture: Show, options: argparse.Namespace) -> None:
    due = time.monotonic()
    while True:
        show_picture(watcher.take(options.interval / 2))
        if options.once:
            return
        due = max(due + options.interval, time.monotonic() + 0.05)
        time.sleep(due - time.monotonic())


@contextmanager
def _output(options: argparse.Namespace) -> Iterator[Show]:
    """How a picture is shown: as a document, redrawn in a terminal, or as lines."""
    if options.json:
        yield lambda picture: _write(json.dumps(document(picture)))
        return
    if not sys.stdout.isatty():
        yield lambda picture: _write("\n".join(lines(picture)))
        return
    unicode = can_show("█░▁▂▃▄▅▆▇█")
    if options.once:
        yield lambda picture: show(rows(picture, 80, unicode=unicode))
        return
    with screen() as drawn:
        if drawn is None:
            # A terminal that cannot be drawn on, such as TERM=dumb.
            yield lambda picture: _write("\n".join(lines(picture)))
        else:
            yield lambda picture: drawn(lambda width: rows(picture, width, unicode=unicode))


def _write(text: str) -> None:
    sys.stdout.write(encodable(text, sys.stdout.encoding) + "\n")
    sys.stdout.flush()


def _settings() -> Settings:
    """The project's settings, for Ollama's address; where they cannot be read, the defaults."""
    from pytest_gpushare.cli.doctor.examine import ask, settings_of

    return settings_of(ask(()))[0]


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does, so that the terminal is put back."""
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
