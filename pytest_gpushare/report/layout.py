"""Lines for a terminal: figures one below another, and no word cut at the right edge.

In a log or a pipe each line stays as it is: one fact, which `grep` finds as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pytest_gpushare.report.header import Line
from pytest_gpushare.text import width_of, wrapped

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
