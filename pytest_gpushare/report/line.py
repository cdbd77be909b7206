"""A line of output."""

from __future__ import annotations

from typing import NamedTuple


class Line(NamedTuple):
    """A line of output and whether it is one that `-q` must not swallow."""

    text: str
    problem: bool = False
