"""A line of output, and where it is shown."""

from __future__ import annotations

from typing import NamedTuple


class Line(NamedTuple):
    """A line of output and whether it is one that `-q` must not swallow."""

    text: str
    problem: bool = False


class View(NamedTuple):
    """How much of it is wanted, and how wide the terminal is."""

    verbosity: int = 0
    """Below 0: problems only; 1 and more: details."""
    columns: int = 80
