"""`pytest-gpushare doctor`: what is wrong here, and how to fix it, on the terminal or as JSON."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib import metadata
from typing import Any

from pytest_gpushare.cli.doctor.examine import (
    Examined,
    Finding,
    Level,
    Section,
    broken,
    find_facts,
)
from pytest_gpushare.cli.doctor.machine import (
    devices,
    driver,
    ollama,
    other_hosts,
    servers,
    sessions,
    visibility,
)
from pytest_gpushare.cli.doctor.project import caps, files, packages, plan, settings, tools
from pytest_gpushare.cli.terminal import FOUND, OK, Piece, Row, show, show_json, terminal_width
from pytest_gpushare.report.document import PLAN_SCHEMA, generator
from pytest_gpushare.text import redactor, wrapped
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
    ("Other servers", (servers,)),
    ("Sessions", (sessions,)),
    ("Settings", (settings,)),
    ("Plan", (plan,)),
    ("Other hosts", (other_hosts,)),
    ("Caps", (caps, tools)),
    ("Project", (files,)),
)


def doctor(options: argparse.Namespace) -> int:
    """Run all checks and print their findings. Returns the exit code."""
    if not sys.warnoptions:
        # The deprecated pynvml warns when it is imported; the finding about it says more.
        warnings.simplefilter("ignore")
    sections = sections_of(find_facts(options.pytest_arguments))
    if options.json:
        show_json(document(sections))
    else:
        show(rows(sections, terminal_width()))
    return FOUND if _count(sections, Level.BROKEN) else OK


def sections_of(found: Examined) -> list[Section]:
    """The findings of all checks; a check that raises becomes a finding and stops no other."""
    result, clean = [], redactor(found.environment)
    for title, checks in _SECTIONS:
        findings: list[Finding] = []
        for check in checks:
            try:
                findings += check(found)
            except Exception as error:
                fact = f"this check itself failed: {type(error).__name__}: {error}"
                fix = "please report it, with this output"
                findings.append(broken("doctor-failed", fact, fix))
        if findings:
            result.append(Section(title, tuple(_clean(finding, clean) for finding in findings)))
    return result


def _clean(finding: Finding, clean: Callable[[str], str]) -> Finding:
    """The finding without the values of variables whose names mark them as secret."""
    return replace(finding, fact=clean(finding.fact), fix=clean(finding.fix))


def rows(sections: Sequence[Section], width: int | None = None) -> Iterator[Row]:
    """The lines: a title per section, its findings, and the fix below a finding that needs one.

    Wrapped at the width of a terminal; whole where `width` is None, for files and bug reports.
    """
    yield [Piece(f"pytest-gpushare {generator()['version']}", "bold")]
    for section in sections:
        yield [Piece("")]
        yield [Piece(section.title, "bold")]
        for finding in section.findings:
            mark = Piece(f"  {f'[{finding.level.value}]':<4} ", _STYLES[finding.level])
            code = f" ({finding.code})" if finding.code else ""
            yield from _indented(mark, Piece(f"{finding.fact}{code}"), width)
            if finding.fix:
                yield from _indented(Piece("       fix: ", "bold"), Piece(finding.fix), width)
            if address := _address(finding.code):
                yield [Piece("       see: ", "bold"), Piece(address)]
    yield [Piece("")]
    yield from _indented(Piece(""), _verdict(sections), width)


def _indented(head: Piece, text: Piece, width: int | None) -> Iterator[Row]:
    """The text after the head, with a hanging indent where it takes several lines."""
    indent = len(head.text)
    whole = " " * indent + text.text
    parts = [whole] if width is None else wrapped(whole, max(indent + 20, width), indent)
    for number, part in enumerate(parts):
        yield [Piece(" " * indent) if number else head, Piece(part[indent:], text.style)]


def document(sections: Sequence[Section]) -> dict[str, Any]:
    """The document of `doctor --json`."""
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
                        "fix": finding.fix or None,
                        "url": _address(finding.code) or None,
                        # The older name of the same field.
                        "mend": finding.fix or None,
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
        return Piece("Nothing to fix.", "green")
    parts = [f"{bad} broken"] if bad else []
    parts += [f"{plural(odd, 'thing')} to look at"] if odd else []
    return Piece(", ".join(parts), "bold red" if bad else "bold yellow")


@lru_cache(maxsize=1)
def _documentation() -> str:
    """The address of the documentation, as the package's metadata has it; else empty."""
    try:
        addresses = metadata.metadata(generator()["name"]).get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return ""
    found = dict(str(address).partition(", ")[::2] for address in addresses)
    return found.get("Documentation", "").rstrip("/")


def _address(code: str) -> str:
    """The section about a finding; empty where the finding has none."""
    base = _documentation()
    return f"{base}/{PAGE}.html#{code}" if base and code else ""


def _count(sections: Sequence[Section], level: Level) -> int:
    return sum(finding.level is level for section in sections for finding in section.findings)
