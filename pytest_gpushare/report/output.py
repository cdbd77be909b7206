"""Where the lines go: pytest's header, its terminal, the log, and report files.

In a terminal figures stand one below another, and no word is cut at the right edge. In a log or a
pipe each line stays as it is: one fact, which `grep` finds as a whole.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpushare.events import Event
from pytest_gpushare.report.header import Line, OutputOptions
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.session.tests import leaks
from pytest_gpushare.text import (
    append_regular,
    encodable,
    printable,
    redactor,
    width_of,
    wrapped,
    write_whole,
)

if TYPE_CHECKING:
    import pytest


def write_reports(document: Mapping[str, Any], files: Sequence[Path]) -> dict[Path, str]:
    """Write the document to each file; returns a sentence for each that could not be written."""
    problems = {}
    for path in files:
        try:
            write_whole(path, _text(document, path))
        except Exception as error:
            # A full disk or any other error: the tests keep their results.
            problems[path] = f"no report in {printable(str(path))}: {why(error)}"
    return problems


def _text(document: Mapping[str, Any], path: Path) -> str:
    if path.suffix.lower() == ".html":
        from pytest_gpushare.report.html.page import page

        return page(document)
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def why(error: Exception) -> str:
    """A reason in a few words, without the path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error)[:200] or type(error).__name__


LOGGER = "pytest_gpushare"

SUMMARY, ACTIONS = "GITHUB_STEP_SUMMARY", "GITHUB_ACTIONS"
"""Variables of GitHub Actions: the file for what a job's page shows; `true` inside of one."""

_WIDE = OutputOptions(0, 400)
"""For readers that are no terminal."""

Header = Callable[[int], list[Line]]
"""The lines of the header, by verbosity."""


def header_lines(header: Header, config: pytest.Config) -> list[str]:
    """The header's lines, in colour where pytest uses it."""
    writer = config.get_terminal_writer()
    return [
        writer.markup(_shown(line.text), **_markup(line))
        for line in _laid_out(header(_verbosity(config)), config)
    ]


def print_problems(header: Header, config: pytest.Config, *, has_summary: bool) -> None:
    """Print the problems where pytest prints no header: under --no-header, and at -q where no
    summary will say it."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    quiet = _verbosity(config) < 0
    no_header = quiet or getattr(config.option, "no_header", False)
    if reporter is not None and no_header and not (quiet and has_summary):
        _print(header(-1), reporter)


def print_summary(run: ActiveRun, reporter: pytest.TerminalReporter) -> None:
    """What the tests used, and what went wrong."""
    _annotate(run, reporter)
    _print(_summary(run, _view(reporter.config)), reporter)
    if _verbosity(reporter.config) >= 0:
        # As pytest does for its own XML file.
        for path in run.written:
            reporter.write_sep("-", _shown(f"generated VRAM report: {path}"))


def _print(lines: Sequence[Line], reporter: pytest.TerminalReporter) -> None:
    for line in _laid_out(lines, reporter.config):
        reporter.write_line(_shown(line.text), **_markup(line))


def _markup(line: Line) -> dict[str, bool]:
    return {line.colour: True} if line.colour else {}


def _laid_out(lines: Sequence[Line], config: pytest.Config) -> Sequence[Line]:
    """The lines as a terminal shows them; in a log or a pipe a fact stays one line."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not reporter.isatty:
        return lines
    return laid_out(lines, int(config.get_terminal_writer().fullwidth))


def publish(run: ActiveRun, config: pytest.Config, exit_status: int) -> None:
    """Write the reports; one that cannot be written is a problem that the summary reports."""
    _note_leaks(run)
    publish_to_github(run)
    if not run.reports:
        return
    from pytest_gpushare.report.document import document

    try:
        view = OutputOptions(max(0, _verbosity(config)), _WIDE.columns)
        lines = [line.text for line in _summary(run, view)]
        whole = document(run, exit_status, lines)
        problems = write_reports(whole, run.reports)
        run.unwritten += problems.values()
        run.written += [path for path in run.reports if path not in problems]
    except Exception as error:
        # The tests have their results: a report must not end in an internal error.
        run.unwritten.append(f"no report: {type(error).__name__}: {error}"[:300])


def publish_to_github(run: ActiveRun) -> None:
    """A table in the summary of the job, where this is one of GitHub Actions."""
    path = os.environ.get(SUMMARY)
    if not path:
        return
    from pytest_gpushare.report.document import step_summary

    try:
        lines = _summary(run, _WIDE)
        append_regular(Path(path), redactor()(step_summary(run, lines)))
    except Exception as error:
        run.unwritten.append(f"no table in {SUMMARY}: {why(error)}")


def _note_leaks(run: ActiveRun) -> None:
    found = leaks(run.tests, run.workers)
    if not found:
        return
    from pytest_gpushare.report.results import leak_text

    for leak in found:
        facts = {"bytes": leak.size, "worker": leak.worker, "suspects": list(leak.suspects)}
        run.record.note("leak", leak_text(leak), **facts)


def _annotate(run: ActiveRun, reporter: pytest.TerminalReporter) -> None:
    if os.environ.get(ACTIONS) != "true":
        return
    from pytest_gpushare.report.document import workflow_commands

    clean = redactor()
    for text in workflow_commands(run):
        reporter.write_line(_shown(clean(text)))


def _summary(run: ActiveRun, view: OutputOptions) -> list[Line]:
    # Nothing of it is needed before the tests, where every import delays the start.
    from pytest_gpushare.report.summary import summary

    return summary(run, view)


def _view(config: pytest.Config) -> OutputOptions:
    # Under -p no:terminal there is none, and no writer either.
    if config.pluginmanager.get_plugin("terminalreporter") is None:
        return OutputOptions(_verbosity(config))
    return OutputOptions(_verbosity(config), int(config.get_terminal_writer().fullwidth))


def log_header(header: Header, config: pytest.Config) -> None:
    """The lines at default verbosity, whatever the terminal's, to the logger `pytest_gpushare`.

    The logger has a level of its own, as the root's default would drop INFO.
    """
    logger = logging.getLogger(LOGGER)
    before = logger.level
    logger.setLevel(logging.INFO)
    config.add_cleanup(lambda: logger.setLevel(before))
    for line in header(max(0, _verbosity(config))):
        _log(logger, line)


def log_summary(run: ActiveRun, config: pytest.Config) -> None:
    """The lines after the tests, at default verbosity, to the same logger."""
    logger = logging.getLogger(LOGGER)
    for line in _summary(run, OutputOptions(max(0, _verbosity(config)), _WIDE.columns)):
        _log(logger, line)


def _verbosity(config: pytest.Config) -> int:
    # The terminal plugin owns the option: in pytest 8.0 -p no:terminal takes it away.
    return int(getattr(config.option, "verbose", 0))


def _log(logger: logging.Logger, line: Line) -> None:
    logger.log(logging.WARNING if line.problem else logging.INFO, "%s", line.text.strip())


def _shown(text: str) -> str:
    """The text as standard output can show it."""
    return encodable(text, getattr(sys.stdout, "encoding", None) or "ascii")


WAITS = ("pressure", "late", "pressure-over", "leases-unknown")
"""Kinds of events: tests wait for VRAM, it comes back late, they go on; the ledger fails."""


def progress(config: pytest.Config) -> Callable[[Event], None]:
    """A listener that writes a line for each wait; nothing at -q, and nothing into a log."""

    def write(event: Event) -> None:
        if event.kind not in WAITS or _verbosity(config) < 0:
            return
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None and reporter.isatty:
            # The dots of the tests so far end without a newline.
            reporter.ensure_newline()
            reporter.write_line(_shown(f"gpu-share: {event.text}"))

    return write


INDENT = 4
"""Blanks before what follows of a line that is broken."""

_FIGURE = re.compile(r"(\d+(?:\.\d+)?)(?= (?:GB|MB|of)\b)")


def laid_out(lines: Sequence[Line], columns: int) -> list[Line]:
    """The lines for a terminal of so many columns."""
    return [
        line._replace(text=part)
        for line in aligned(lines)
        for part in wrapped(line.text, columns, INDENT)
    ]


def aligned(lines: Iterable[Line]) -> list[Line]:
    """The lines, with the figures of those that say the same of several things in columns."""
    lines = list(lines)
    groups: dict[tuple[str, ...], list[int]] = {}
    parts = [_FIGURE.split(line.text) for line in lines]
    for at, pieces in enumerate(parts):
        # What stands before each figure; names of devices and workers differ in their numbers.
        words = tuple(re.sub(r"\d+", "#", piece) for piece in pieces[:-1:2])
        if words:
            groups.setdefault(words, []).append(at)
    for members in groups.values():
        for figure in range(1, len(parts[members[0]]), 2):
            widest = max(len(parts[at][figure]) for at in members)
            for at in members:
                parts[at][figure] = parts[at][figure].rjust(widest)
        # The names before the first figure may differ in length too.
        start = max(width_of(parts[at][0]) for at in members)
        for at in members:
            first = parts[at][0]
            parts[at][0] = first + " " * (start - width_of(first))
    return [line._replace(text="".join(pieces)) for line, pieces in zip(lines, parts, strict=True)]
