"""Waits are told where somebody sits, and nowhere else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pytest_gpushare.events import Record
from pytest_gpushare.report.output import progress


class Reporter:
    def __init__(self, isatty: bool) -> None:
        self.isatty = isatty
        self.lines: list[str] = []

    def ensure_newline(self) -> None:
        self.lines.append("")

    def write_line(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize(
    ("isatty", "verbose", "lines"),
    [
        (True, 0, ["", "gpu-share: GPU 0: t waits", "", "gpu-share: GPU 0: again"]),
        (True, -1, []),
        (False, 1, []),
    ],
)
def test_waits(isatty: bool, verbose: int, lines: list[str]) -> None:
    reporter = Reporter(isatty)
    config: Any = SimpleNamespace(
        option=SimpleNamespace(verbose=verbose),
        pluginmanager=SimpleNamespace(get_plugin=lambda _name: reporter),
    )
    record = Record()
    record.listen(progress(config))
    record.note("pressure", "GPU 0: t waits")
    record.note("ollama-loaded", "not a wait")
    record.note("pressure-over", "GPU 0: again")
    assert reporter.lines == lines


def test_a_listener_that_fails_loses_no_event() -> None:
    record = Record()
    record.listen(lambda _event: 1 / 0)
    record.note("pressure", "text")
    assert [event.text for event in record.events()] == ["text"]
