"""The commands on report files: `compare` shows how two differ, `merge` makes one of several."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pytest_gpushare.cli.terminal import (
    OK,
    REFUSED,
    Piece,
    Row,
    show,
    show_json,
    terminal_width,
    write_lines,
)
from pytest_gpushare.config.sources import report_files
from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.report.html import comparison
from pytest_gpushare.report.html.comparison import ComparedSubject, Difference
from pytest_gpushare.report.merge import merged, names_of
from pytest_gpushare.report.publish import write_reports
from pytest_gpushare.report.reading import read_report
from pytest_gpushare.text import redacted, redactor, width_of, wrapped, write_whole
from pytest_gpushare.units import plural

_STYLES = {"good": "green", "bad": "red", "": ""}
_WIDEST = 44
"""Columns of a name beyond which its figures stand in the next line."""


def compare(options: argparse.Namespace) -> int:
    """Print the comparison, and write it as a page where one is asked for."""
    before, after = (read_report(Path(name)) for name in options.reports)
    sections = comparison.compare(before, after)
    if options.page is not None:
        _write_page(Path(options.page), options.reports, sections)
    if options.json:
        show_json(comparison.document(sections))
    else:
        show(rows(sections, terminal_width()))
    return OK


def rows(sections: Sequence[ComparedSubject], width: int | None = None) -> Iterator[Row]:
    """The lines: a title per section, and a line for each difference."""
    for number, section in enumerate(sections):
        if number:
            yield [Piece("")]
        yield [Piece(section.title, "bold")]
        yield from _table(section.rows, width)
        if section.note:
            yield [Piece(f"  {section.note}", "dim")]


def _table(found: Sequence[Difference], width: int | None) -> Iterator[Row]:
    name = _widest(row.name for row in found)
    old, new = _widest(row.before for row in found), _widest(row.after for row in found)
    for row in found:
        change = f"  {row.change}" if row.change else ""
        after = _padded(row.after, new) if change else row.after
        line = f"  {_padded(row.name, name)}  {_padded(row.before, old)} → {after}"
        whole = f"{line}{change}"
        if width is None:
            # In a file each difference is one line.
            yield [Piece(" ".join(whole.split()) if _is_long(row) else whole)]
        elif width_of(whole) <= width and not _is_long(row):
            yield [Piece(line), Piece(change, _STYLES[row.state])]
        else:
            for text in wrapped(f"  {row.name}", width, 4):
                yield [Piece(text)]
            for text in wrapped(f"    {row.before} → {row.after}{change}", width, 6):
                yield [Piece(text, _STYLES[row.state])]


def _widest(texts: Iterable[str]) -> int:
    return max((width for width in map(width_of, texts) if width <= _WIDEST), default=0)


def _is_long(row: Difference) -> bool:
    return any(width_of(text) > _WIDEST for text in (row.name, row.before, row.after))


def _padded(text: str, columns: int) -> str:
    return text + " " * max(0, columns - width_of(text))


def _write_page(path: Path, names: Sequence[str], sections: Sequence[ComparedSubject]) -> None:
    if path.suffix.lower() != ".html":
        raise GpuShareError(f"-o {path}: allowed is a file that ends in .html")
    try:
        write_whole(path, comparison.page(names, sections))
    except OSError as error:
        raise GpuShareError(f"{path}: cannot be written: {error.strerror or error}") from None


MOST_REPORTS = 1000


def merge(options: argparse.Namespace) -> int:
    """Write the report. Returns the exit code."""
    paths = [Path(text) for text in options.reports]
    if len(paths) > MOST_REPORTS:
        raise GpuShareError(f"{len(paths)} reports: at most {MOST_REPORTS} are merged")
    files = report_files(options.output, Path.cwd(), "-o")
    redact = redactor()
    document = redacted(
        merged([read_report(path) for path in paths], names_of(paths)),
        # A foreign text may have halves of characters, which no file can hold.
        lambda text: redact(text.encode("utf-8", "replace").decode("utf-8")),
    )
    problems = write_reports(document, files)
    for text in problems.values():
        print(f"ERROR: {text}", file=sys.stderr)  # noqa: T201
    if problems:
        return REFUSED
    tests, shards = plural(len(document["tests"]), "test"), plural(len(paths), "report")
    text = f"gpu-share: {shards} with {tests} merged into {', '.join(p.name for p in files)}"
    write_lines([text])
    return OK
