"""Long waits while they last: told in a terminal, where somebody sits and wonders."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pytest_gpushare.report.output import encodable
from pytest_gpushare.run.record import Event

if TYPE_CHECKING:
    import pytest

WAITS = ("pressure", "late", "pressure-over")
"""Kinds of events: tests wait for VRAM, it comes back late, they go on."""


def progress(config: pytest.Config) -> Callable[[Event], None]:
    """A listener that writes a line for each wait; nothing at -q, and nothing into a log."""

    def tell(event: Event) -> None:
        if event.kind not in WAITS or int(getattr(config.option, "verbose", 0)) < 0:
            return
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None and reporter.isatty:
            # The dots of the tests so far end without a newline.
            reporter.ensure_newline()
            reporter.write_line(encodable(f"gpu-share: {event.text}"))

    return tell
