"""Where the lines go: pytest's header, its terminal, the log."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from pytest_gpushare.report.line import Line, View
from pytest_gpushare.report.terminal import header, summary
from pytest_gpushare.run.started import LeftAlone, Started

if TYPE_CHECKING:
    import pytest

LOGGER = "pytest_gpushare"

SUMMARY, ACTIONS = "GITHUB_STEP_SUMMARY", "GITHUB_ACTIONS"
"""Variables of GitHub Actions: the file for what a job's page shows; `true` inside of one."""

_WIDE = View(0, 400)
"""For readers that are no terminal."""

_PLAIN = str.maketrans("×▁▂▃▄▅▆▇█", "x_.-=+*#@")
"""Signs that stand for those that a terminal lacks."""


def header_lines(started: Started | LeftAlone, config: pytest.Config) -> list[str]:
    """The header's lines, problems in yellow where pytest uses colour."""
    writer = config.get_terminal_writer()
    return [
        writer.markup(encodable(line.text), yellow=True) if line.problem else encodable(line.text)
        for line in header(started, _verbosity(config))
    ]


def print_problems(started: Started | LeftAlone, config: pytest.Config) -> None:
    """At -q and under --no-header pytest prints no header: the problems are told all the same."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    no_header = _verbosity(config) < 0 or getattr(config.option, "no_header", False)
    if reporter is not None and no_header:
        for line in header(started, -1):
            reporter.write_line(encodable(line.text), yellow=True)


def print_summary(started: Started | LeftAlone, reporter: pytest.TerminalReporter) -> None:
    """What the tests used, and what went wrong, in red where it fails the run."""
    failed = started.has_failed()
    _annotate(started, reporter)
    for line in summary(started, _view(reporter.config)):
        marks = {"red": failed, "yellow": not failed} if line.problem else {}
        reporter.write_line(encodable(line.text), **marks)


def publish(started: Started | LeftAlone, config: pytest.Config, exit_status: int) -> None:
    """Write the reports; one that cannot be written is a problem that the summary tells."""
    if isinstance(started, LeftAlone):
        return
    _note_leaks(started)
    publish_to_github(started)
    if not started.reports:
        return
    from pytest_gpushare.report.document import document
    from pytest_gpushare.report.files import write_reports

    try:
        lines = [line.text for line in summary(started, _view(config))]
        whole = document(started, exit_status, lines)
        started.unwritten += write_reports(whole, started.reports)
    except Exception as error:
        # The tests have their results; a report is not worth an internal error.
        started.unwritten.append(f"no report: {type(error).__name__}: {error}"[:300])


def publish_to_github(started: Started) -> None:
    """A table in the summary of the job, where this is one of GitHub Actions."""
    path = os.environ.get(SUMMARY)
    if not path:
        return
    from pytest_gpushare.report.clean import cleaner
    from pytest_gpushare.report.files import why
    from pytest_gpushare.report.github import append, step_summary

    try:
        lines = summary(started, _WIDE)
        append(path, cleaner()(step_summary(started, lines)))
    except Exception as error:
        started.unwritten.append(f"no table in {SUMMARY}: {why(error)}")


def _note_leaks(started: Started) -> None:
    from pytest_gpushare.report.left_behind import leaks

    found = leaks(started)
    if not found:
        return
    from pytest_gpushare.report.usage import leak_in_words

    for leak in found:
        facts = {"bytes": leak.size, "worker": leak.worker, "suspects": list(leak.suspects)}
        started.record.note("leak", leak_in_words(leak), **facts)


def _annotate(started: Started | LeftAlone, reporter: pytest.TerminalReporter) -> None:
    if isinstance(started, LeftAlone) or os.environ.get(ACTIONS) != "true":
        return
    from pytest_gpushare.report.clean import cleaner
    from pytest_gpushare.report.github import workflow_commands

    clean = cleaner()
    for text in workflow_commands(started):
        reporter.write_line(encodable(clean(text)))


def _view(config: pytest.Config) -> View:
    # Under -p no:terminal there is none, and no writer either.
    if config.pluginmanager.get_plugin("terminalreporter") is None:
        return View(_verbosity(config))
    return View(_verbosity(config), int(config.get_terminal_writer().fullwidth))


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


def encodable(text: str) -> str:
    """The text as standard output can show it."""
    return in_encoding(text, getattr(sys.stdout, "encoding", None) or "ascii")


def in_encoding(text: str, encoding: str) -> str:
    """The text as the terminal can show it; Windows code pages may lack the signs."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "replace").decode(encoding)
    return text
