"""What is published when the tests are over: the summary, the report's files, GitHub's job page."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpushare.planning.plan import shortage
from pytest_gpushare.report.advice import amount
from pytest_gpushare.report.header import Line, OutputOptions
from pytest_gpushare.report.output import (
    LOGGER,
    WIDE,
    log_line,
    print_lines,
    shown_text,
    verbosity_of,
)
from pytest_gpushare.report.results import HINT, Results, leak_text, summary
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.text import append_regular, printable, redactor, write_whole
from pytest_gpushare.units import format_gb

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


def _publish_to_github(results: Results) -> None:
    """A table in the summary of the job, where this is one of GitHub Actions."""
    path = os.environ.get(SUMMARY)
    if not path:
        return
    try:
        lines = summary(results, WIDE)
        append_regular(Path(path), redactor()(step_summary(results, lines)))
    except Exception as error:
        results.run.unwritten.append(f"no table in {SUMMARY}: {why(error)}")


def print_summary(results: Results, reporter: pytest.TerminalReporter) -> None:
    """What the tests used, and what went wrong."""
    if os.environ.get(ACTIONS) == "true":
        clean = redactor()
        for text in workflow_commands(results):
            reporter.write_line(shown_text(clean(text)))
    config = reporter.config
    view = OutputOptions(verbosity_of(config), int(config.get_terminal_writer().fullwidth))
    print_lines(summary(results, view), reporter)
    if view.verbosity >= 0:
        # As pytest does for its own XML file.
        for path in results.run.written:
            reporter.write_sep("-", shown_text(f"generated VRAM report: {path}"))


_MOST_ANNOTATIONS = 10
"""GitHub shows ten of a kind for each step."""
_LONGEST = 300
_HARMLESS = frozenset(" .,:/%()=")


def step_summary(results: Results, lines: Sequence[Line]) -> str:
    """Markdown: the devices, hosts, highest peaks, what became of Ollama's models, and every
    problem; text is escaped."""
    run = results.run
    parts = ["### gpu-share", "", *_table(results)]
    if run.hosts:
        parts += ["", "| host | GPU workers | CPU workers | tests | |", "|---|---|---|---|---|"]
        parts += [f"| {' | '.join(map(escaped, row))} |" for row in _host_rows(run)]
    if results.highest_peaks:
        parts += ["", "| test | VRAM |", "|---|---|"]
        for test in results.highest_peaks:
            assert test.peak is not None
            parts.append(f"| {escaped(test.nodeid)} | {amount(test.peak)} |")
    notable = [
        line.text.strip()
        for line in lines
        if line.problem or line.mark or line.text.startswith(HINT)
    ]
    if notable:
        parts += ["", *(f"- {escaped(text)}" for text in notable)]
    return "\n".join([*parts, "", ""])


def workflow_commands(results: Results) -> Iterator[str]:
    """The workflow commands for spills and leaks; errors where they fail the run."""
    run = results.run
    spills = [event.text for event in run.record.events("ollama-spilled")]
    kind = "error" if spills and run.has_failed() else "warning"
    for text in spills[:_MOST_ANNOTATIONS]:
        yield f"::{kind} title={_property('gpu-share: Ollama')}::{_data(text)}"
    for leak in results.leaks[:_MOST_ANNOTATIONS]:
        name = leak.suspects[0] if leak.among == 1 else ""
        file = name.partition("::")[0]
        place = f"file={_property(file)}," if file else ""
        title = _property("gpu-share: VRAM left behind")
        yield f"::warning {place}title={title}::{_data(leak_text(leak))}"


def escaped(text: str) -> str:
    """A text that Markdown and HTML take as it is: every sign that means something is a number."""
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return "".join(
        c if c.isalnum() or c in _HARMLESS else f"&#{ord(c)};" if c.isprintable() else " "
        for c in text
    )


def _table(results: Results) -> Iterator[str]:
    yield "| device | VRAM peak | of | tests, peak | usable for tests | GPU workers |"
    yield "|---|---|---|---|---|---|"
    seen = {use.plan.device.uuid: use for use in results.usages}
    run = results.run
    for plan in run.plan.devices:
        use = seen.get(plan.device.uuid)
        cells = [
            f"{plan.device.label} {plan.device.name}",
            "unknown" if use is None else use.used,
            format_gb(plan.device.total),
            (use.tests if use is not None else "") or "unknown",
            format_gb(plan.budget),
            str(plan.workers),
        ]
        yield f"| {' | '.join(escaped(cell) for cell in cells)} |"
    if not run.plan.devices:
        yield f"| {escaped(run.plan.absence or 'no GPU')} | | | | | |"


def _host_rows(run: ActiveRun) -> Iterator[list[str]]:
    """For each host: its name, GPU and CPU workers, tests that ran there, and what went wrong."""
    tests = Counter(run.host_named(test.worker) for test in run.tests)
    for host in run.hosts:
        missing = "" if host.plan.slots else shortage(host.plan)
        yield [
            host.label,
            str(len(host.plan.slots)),
            str(host.plan.cpu_workers),
            str(tests[host.name or None]),
            f"lost: {host.lost}" if host.lost else missing,
        ]


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
