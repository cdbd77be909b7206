"""Where the lines go: pytest's header, its terminal, the log."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from pytest_gpushare.report.line import Line
from pytest_gpushare.report.terminal import header, summary
from pytest_gpushare.run.started import LeftAlone, Started

if TYPE_CHECKING:
    import pytest

LOGGER = "pytest_gpushare"


def header_lines(started: Started | LeftAlone, config: pytest.Config) -> list[str]:
    """The header's lines, problems in yellow where pytest uses colour."""
    writer = config.get_terminal_writer()
    return [
        writer.markup(_encodable(line.text), yellow=True) if line.problem else _encodable(line.text)
        for line in header(started, _verbosity(config))
    ]


def print_problems(started: Started | LeftAlone, config: pytest.Config) -> None:
    """At -q and under --no-header pytest prints no header: the problems are told all the same."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    no_header = _verbosity(config) < 0 or getattr(config.option, "no_header", False)
    if reporter is not None and no_header:
        for line in header(started, -1):
            reporter.write_line(_encodable(line.text), yellow=True)


def print_summary(started: Started | LeftAlone, reporter: pytest.TerminalReporter) -> None:
    """What went wrong while the tests ran, in red where it fails the run."""
    failed = started.has_failed()
    for line in summary(started):
        marks = {"red": failed, "yellow": not failed} if line.problem else {}
        reporter.write_line(_encodable(line.text), **marks)


def log_lines(started: Started | LeftAlone, config: pytest.Config) -> None:
    """The lines at default verbosity, whatever the terminal's, to the logger `pytest_gpushare`.

    The logger has a level of its own, as the root's default would drop INFO.
    """
    logger = logging.getLogger(LOGGER)
    before = logger.level
    logger.setLevel(logging.INFO)
    config.add_cleanup(lambda: logger.setLevel(before))
    for line in header(started, max(0, _verbosity(config))):
        _log(logger, line)


def _verbosity(config: pytest.Config) -> int:
    # The terminal plugin owns the option: in pytest 8.0 -p no:terminal takes it away.
    return int(getattr(config.option, "verbose", 0))


def _log(logger: logging.Logger, line: Line) -> None:
    logger.log(logging.WARNING if line.problem else logging.INFO, "%s", line.text.strip())


def _encodable(text: str) -> str:
    """The text as the terminal can show it; Windows code pages may lack the signs."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace("×", "x").encode(encoding, "replace").decode(encoding)
    return text
