"""GitHub Actions: a table in the job's summary, and annotations for what a person must see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pytest_gpushare.report.advice import assess
from pytest_gpushare.report.summary import Line, hungriest, leak_in_words, usages
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.session.tests import leaks
from pytest_gpushare.text import append_regular
from pytest_gpushare.units import format_gb

"""Environment variables: the file of the job's summary; `true` where a job of Actions runs."""

_MOST_ANNOTATIONS = 10
"""GitHub shows ten of a kind for each step."""
_LONGEST = 300
_HARMLESS = frozenset(" .,:/%()=")


def step_summary(run: ActiveRun, lines: Sequence[Line]) -> str:
    """Markdown: the devices, the hungriest tests, and every problem; user-made text escaped."""
    parts = ["### gpu-share", "", *_table(run)]
    tests = hungriest(run)
    if tests:
        parts += ["", "| test | VRAM |", "|---|---|"]
        for test in tests:
            assert test.peak is not None
            size = f"{'' if test.peak.exact else 'at least '}{format_gb(test.peak.size)}"
            parts.append(f"| {escaped(test.nodeid)} | {size} |")
    told = [line.text for line in lines if line.problem]
    told += [advice.text for advice in assess(run).advice]
    if told:
        parts += ["", *(f"- {escaped(text.strip())}" for text in told)]
    return "\n".join([*parts, "", ""])


def append(path: str, text: str) -> None:
    """Add to the job's summary. Raises `OSError` where that cannot be."""
    append_regular(Path(path), text)


def workflow_commands(run: ActiveRun) -> Iterator[str]:
    """The workflow commands for spills and leaks; errors where they fail the run."""
    spills = [event.text for event in run.record.events("ollama-spilled")]
    kind = "error" if spills and run.has_failed() else "warning"
    for text in spills[:_MOST_ANNOTATIONS]:
        yield f"::{kind} title={_property('gpu-share: Ollama')}::{_data(text)}"
    for leak in leaks(run.tests, run.workers)[:_MOST_ANNOTATIONS]:
        name = leak.suspects[0] if leak.among == 1 else ""
        file = name.partition("::")[0]
        place = f"file={_property(file)}," if file else ""
        title = _property("gpu-share: VRAM left behind")
        yield f"::warning {place}title={title}::{_data(leak_in_words(leak))}"


def escaped(text: str) -> str:
    """A text that Markdown and HTML take as it is: every sign that means something is a number."""
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return "".join(
        c if c.isalnum() or c in _HARMLESS else f"&#{ord(c)};" if c.isprintable() else " "
        for c in text
    )


def _table(run: ActiveRun) -> Iterator[str]:
    yield "| device | VRAM peak | of | tests, peak | usable for tests | GPU workers |"
    yield "|---|---|---|---|---|---|"
    seen = {use.plan.device.uuid: use for use in usages(run)}
    for plan in run.plan.devices:
        use = seen.get(plan.device.uuid)
        cells = [
            f"{plan.device.label} {plan.device.name}",
            "unknown" if use is None else format_gb(use.peak_used),
            format_gb(plan.device.total),
            (use.tests if use is not None else "") or "unknown",
            format_gb(plan.budget),
            str(plan.workers),
        ]
        yield f"| {' | '.join(escaped(cell) for cell in cells)} |"
    if not run.plan.devices:
        yield f"| {escaped(run.plan.absence or 'no GPU')} | | | | | |"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
