"""What is published when the tests are over: the summary, the report's files, GitHub's job page."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpushare.report.output import (
    LOGGER,
    WIDE,
    OutputOptions,
    for_stdout,
    log_line,
    print_lines,
    verbosity_of,
)
from pytest_gpushare.report.results import Results
from pytest_gpushare.report.summary import leak_text, step_summary, summary, workflow_commands
from pytest_gpushare.text import append_regular, printable, redactor, write_whole

if TYPE_CHECKING:
    import pytest

SUMMARY, ACTIONS = "GITHUB_STEP_SUMMARY", "GITHUB_ACTIONS"
"""Variables of GitHub Actions: the file for what a job's page shows; `true` inside of one."""


def publish(results: Results, config: pytest.Config, exit_status: int) -> None:
    """Write GitHub's job page, the reports, and the lines after the tests to the same logger as the
    header; a report that cannot be written is a problem of which the lines inform."""
    run, view = results.run, OutputOptions(max(0, verbosity_of(config)), WIDE.columns)
    for leak in results.leaks:
        facts = {"bytes": leak.size, "worker": leak.worker, "suspects": list(leak.suspects)}
        run.record.note("leak", leak_text(leak), **facts)
    _publish_to_github(results)
    if run.reports:
        _publish_reports(results, view, exit_status)
    logger = logging.getLogger(LOGGER)
    for line in summary(results, view):
        log_line(logger, line)


def _publish_reports(results: Results, view: OutputOptions, exit_status: int) -> None:
    """The files that the user asked for."""
    from pytest_gpushare.report.document import document

    run = results.run
    try:
        lines = [line.text for line in summary(results, view)]
        whole = document(results, exit_status, lines)
        problems = write_reports(whole, run.reports)
        run.unwritten += problems.values()
        run.written += [path for path in run.reports if path not in problems]
    except Exception as error:
        # The tests have their results: a report must not end in an internal error.
        run.unwritten.append(f"no report: {type(error).__name__}: {error}"[:300])


def write_reports(document: Mapping[str, Any], files: Sequence[Path]) -> dict[Path, str]:
    """Write the document to each file; returns a sentence for each that could not be written."""
    problems = {}
    for path in files:
        try:
            write_whole(path, _text(document, path))
        except Exception as error:
            # A full disk or any other error: the tests keep their results.
            problems[path] = f"no report in {printable(str(path))}: {_reason(error)}"
    return problems


def _text(document: Mapping[str, Any], path: Path) -> str:
    if path.suffix.lower() == ".html":
        from pytest_gpushare.report.html import page

        return page(document)
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def _reason(error: Exception) -> str:
    """A reason in a few words, without the path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error)[:200] or type(error).__name__


def _publish_to_github(results: Results) -> None:
    """A table in the summary of the job, where this is one of GitHub Actions."""
    path = os.environ.get(SUMMARY)
    if not path:
        return
    try:
        lines = summary(results, WIDE)
        append_regular(Path(path), redactor()(step_summary(results, lines)))
    except Exception as error:
        results.run.unwritten.append(f"no table in {SUMMARY}: {_reason(error)}")


def print_summary(results: Results, reporter: pytest.TerminalReporter) -> None:
    """What the tests used, and what went wrong."""
    if os.environ.get(ACTIONS) == "true":
        clean = redactor()
        for text in workflow_commands(results):
            reporter.write_line(for_stdout(clean(text)))
    config = reporter.config
    view = OutputOptions(verbosity_of(config), int(config.get_terminal_writer().fullwidth))
    print_lines(summary(results, view), reporter)
    if view.verbosity >= 0:
        # As pytest does for its own XML file.
        for path in results.run.written:
            reporter.write_sep("-", for_stdout(f"generated VRAM report: {path}"))
