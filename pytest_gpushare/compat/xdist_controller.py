"""xdist in the controller: its events, and how it compares what workers collected.

Names of xdist that are used:

- `WorkerController.notify_inproc` (since 1.0): puts an event into xdist's queue. The event
  `unscheduled` (since 3.2) without tests changes nothing, and has xdist call its scheduler.
  Without it a test that waits for VRAM is looked at again when a worker reports the next time.
- The plugin `dsession`, its `shuttingdown` and `shouldstop` (since 1.0): whether the run is ending.
  Without them tests are handed out until the workers are gone.
- `xdist.report.report_collection_diff` (since 1.0): the text of an error. Without it the text is
  our own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest


def wake(node: Any) -> None:
    """Have xdist call the scheduler in its own thread, by an event that changes nothing."""
    notify = getattr(node, "notify_inproc", None)
    if notify is not None:
        notify("unscheduled", node=node, indices=[])


def is_ending(plugins: pytest.PytestPluginManager) -> bool:
    """Whether xdist has ended the workers, or is about to."""
    session = plugins.get_plugin("dsession")
    return bool(getattr(session, "shuttingdown", False) or getattr(session, "shouldstop", False))


def collection_difference(
    first: Sequence[str], second: Sequence[str], first_id: str, second_id: str
) -> str:
    """Why these two workers cannot run the same tests; empty where they collected the same."""
    if list(first) == list(second):
        return ""
    with contextlib.suppress(ImportError, AttributeError):
        report = import_module("xdist.report")
        return str(report.report_collection_diff(first, second, first_id, second_id))
    return f"Different tests were collected between {first_id} and {second_id}"
