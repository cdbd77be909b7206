"""The findings in sections, on the terminal or as a document."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from textwrap import wrap
from typing import Any

from pytest_gpushare.cli.doctor.examine import Examined, examine
from pytest_gpushare.cli.doctor.findings import Finding, Level, Section, broken
from pytest_gpushare.cli.doctor.gpus import devices, driver, visibility
from pytest_gpushare.cli.doctor.ollama import ollama
from pytest_gpushare.cli.doctor.project import caps, files, packages, plan, settings, tools
from pytest_gpushare.cli.terminal import FOUND, OK, Piece, Row, show, show_json, terminal_width
from pytest_gpushare.report.document import PLAN_SCHEMA, generator
from pytest_gpushare.report.redact import cleaner
from pytest_gpushare.units import plural

PAGE = "how-to/doctor"

_STYLES = {Level.OK: "green", Level.LOOK: "bold yellow", Level.BROKEN: "bold red"}

Check = Callable[[Examined], Iterator[Finding]]

_SECTIONS: Sequence[tuple[str, Sequence[Check]]] = (
    ("Packages", (packages,)),
    ("Driver", (driver,)),
    ("Devices", (devices,)),
    ("Visibility", (visibility,)),
    ("Ollama", (ollama,)),
    ("Settings", (settings,)),
    ("Plan", (plan,)),
    ("Caps", (caps, tools)),
    ("Project", (files,)),
)


def tell(options: argparse.Namespace) -> int:
    """Examine, print, and give the exit code."""
    found = examine(options.pytest_arguments)
    sections = sections_of(found)
    if options.json:
        show_json(document(sections))
    else:
        show(rows(sections, terminal_width()))
    return FOUND if _count(sections, Level.BROKEN) else OK


def sections_of(found: Examined) -> list[Section]:
    """All findings; a check that fails itself is one, and keeps no other from being told."""
    result, clean = [], cleaner(found.environment)
    for title, checks in _SECTIONS:
        findings: list[Finding] = []
        for check in checks:
            try:
                findings += check(found)
            except Exception as error:
                fact = f"this check itself failed: {type(error).__name__}: {error}"
                mend = "please report it, with this output"
                findings.append(broken("doctor-failed", fact, mend))
        if findings:
            result.append(Section(title, tuple(_clean(finding, clean) for finding in findings)))
    return result


def _clean(finding: Finding, clean: Callable[[str], str]) -> Finding:
    """Without values that are secret by their variables' names, wherever they came from."""
    return replace(finding, fact=clean(finding.fact), mend=clean(finding.mend))


def rows(sections: Sequence[Section], width: int | None = None) -> Iterator[Row]:
    """The lines: a title for each section, and under what is not well its mend.

    Wrapped where a terminal has a width; whole where they go into a file or a bug report.
    """
    yield [Piece(f"pytest-gpushare {generator()['version']}", "bold")]
    for section in sections:
        yield [Piece("")]
        yield [Piece(section.title, "bold")]
        for finding in section.findings:
            mark = Piece(f"  {f'[{finding.level.value}]':<4} ", _STYLES[finding.level])
            code = f" ({finding.code})" if finding.code else ""
            yield from _indented(mark, Piece(f"{finding.fact}{code}"), width)
            if finding.mend:
                yield from _indented(Piece("       mend: ", "bold"), Piece(finding.mend), width)
    yield [Piece("")]
    yield from _indented(Piece(""), _verdict(sections), width)


def _indented(head: Piece, text: Piece, width: int | None) -> Iterator[Row]:
    """The text behind the head, and under itself where it takes several lines."""
    indent = len(head.text)
    parts = [text.text]
    if width is not None:
        room = max(20, width - indent)
        parts = wrap(text.text, room, break_long_words=False, break_on_hyphens=False) or [""]
    for number, part in enumerate(parts):
        yield [Piece(" " * indent) if number else head, Piece(part, text.style)]


def document(sections: Sequence[Section]) -> dict[str, Any]:
    """What `doctor --json` prints."""
    return {
        "schema": PLAN_SCHEMA,
        "generator": generator(),
        "broken": _count(sections, Level.BROKEN),
        "look": _count(sections, Level.LOOK),
        "sections": [
            {
                "title": section.title,
                "findings": [
                    {
                        "level": {"ok": "ok", "!": "look", "x": "broken"}[finding.level.value],
                        "code": finding.code or None,
                        "fact": finding.fact,
                        "mend": finding.mend or None,
                    }
                    for finding in section.findings
                ],
            }
            for section in sections
        ],
    }


def _verdict(sections: Sequence[Section]) -> Piece:
    bad, odd = _count(sections, Level.BROKEN), _count(sections, Level.LOOK)
    if not bad and not odd:
        return Piece("All is well.", "green")
    parts = [f"{bad} broken"] if bad else []
    parts += [f"{plural(odd, 'thing')} to look at"] if odd else []
    where = f"each word in brackets is a section of {PAGE} in the documentation"
    return Piece(f"{', '.join(parts)}; {where}", "bold red" if bad else "bold yellow")


def _count(sections: Sequence[Section], level: Level) -> int:
    return sum(finding.level is level for section in sections for finding in section.findings)
