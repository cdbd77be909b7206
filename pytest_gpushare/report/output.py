"""Where lines go: pytest's header, its terminal, and the log.

In a terminal figures stand one below another, and no word is cut at the right edge. In a log or a
pipe each line stays as it is: one fact, which `grep` finds as a whole.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.events import Event
from pytest_gpushare.text import encodable, width_of, wrapped

if TYPE_CHECKING:
    import pytest

LOGGER = "pytest_gpushare"


class Line(NamedTuple):
    """A line of output."""

    text: str
    problem: bool = False
    """Whether it needs attention."""
    mark: str = ""
    """`green` or `red`; empty: yellow for a problem, else plain."""

    @property
    def colour(self) -> str:
        """The colour in a terminal; empty: none."""
        return self.mark or ("yellow" if self.problem else "")


class OutputOptions(NamedTuple):
    """How much of it is wanted, and how wide a picture may be."""

    verbosity: int = 0
    """Below 0: problems only; 1 and more: details."""
    columns: int = 80


WIDE = OutputOptions(0, 400)
"""For readers that are no terminal."""

Header = Callable[[int], list[Line]]
"""The lines of the header, by verbosity."""


def header_lines(header: Header, config: pytest.Config) -> list[str]:
    """The header's lines, in colour where pytest uses it."""
    writer = config.get_terminal_writer()
    return [
        writer.markup(for_stdout(line.text), **_markup(line))
        for line in _laid_out(header(verbosity_of(config)), config)
    ]


def print_problems(header: Header, config: pytest.Config, *, has_summary: bool) -> None:
    """Print the problems where pytest prints no header: under --no-header, and at -q where no
    summary will say it."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    quiet = verbosity_of(config) < 0
    no_header = quiet or getattr(config.option, "no_header", False)
    if reporter is not None and no_header and not (quiet and has_summary):
        print_lines(header(-1), reporter)


def print_lines(lines: Sequence[Line], reporter: pytest.TerminalReporter) -> None:
    """Print the lines, in colour where pytest uses it."""
    for line in _laid_out(lines, reporter.config):
        reporter.write_line(for_stdout(line.text), **_markup(line))


def _markup(line: Line) -> dict[str, bool]:
    return {line.colour: True} if line.colour else {}


def _laid_out(lines: Sequence[Line], config: pytest.Config) -> Sequence[Line]:
    """The lines as a terminal shows them; in a log or a pipe a fact stays one line."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not reporter.isatty:
        return lines
    return laid_out(lines, int(config.get_terminal_writer().fullwidth))


def log_header(header: Header, config: pytest.Config) -> None:
    """The lines at default verbosity, whatever the terminal's, to the logger `pytest_gpushare`.

    The logger has a level of its own, as the root's default would drop INFO.
    """
    logger = logging.getLogger(LOGGER)
    before = logger.level
    logger.setLevel(logging.INFO)
    config.add_cleanup(lambda: logger.setLevel(before))
    for line in header(max(0, verbosity_of(config))):
        log_line(logger, line)


def verbosity_of(config: pytest.Config) -> int:
    """The number of `-v`, less that of `-q`."""
    # The terminal plugin owns the option: in pytest 8.0 -p no:terminal takes it away.
    return int(getattr(config.option, "verbose", 0))


def log_line(logger: logging.Logger, line: Line) -> None:
    """A line of output as a record of the log."""
    logger.log(logging.WARNING if line.problem else logging.INFO, "%s", line.text.strip())


def for_stdout(text: str) -> str:
    """The text as standard output can show it."""
    return encodable(text, getattr(sys.stdout, "encoding", None) or "ascii")


WAITS = ("pressure", "late", "pressure-over", "leases-unknown")
"""Kinds of events: tests wait for VRAM, it comes back late, they go on; the ledger fails."""


def progress(config: pytest.Config) -> Callable[[Event], None]:
    """A listener that writes a line for each wait; nothing at -q, and nothing into a log."""

    def write(event: Event) -> None:
        if event.kind not in WAITS or verbosity_of(config) < 0:
            return
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None and reporter.isatty:
            # The dots of the tests so far end without a newline.
            reporter.ensure_newline()
            reporter.write_line(for_stdout(f"gpu-share: {event.text}"))

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
