"""A bar of parts against a whole, as a picture that needs no script and no inline style."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pytest_gpushare.report.page.markup import Markup, tag
from pytest_gpushare.report.page.words import size

_WIDTH, _HEIGHT = 1000, 24


class Part(NamedTuple):
    """A part of a bar."""

    kind: str
    """Its class in the stylesheet: `ollama`, `others`, `rest`, `cpu`, `worker-0` ..."""
    name: str
    held: float
    """Bytes."""


def meter(parts: Sequence[Part], total: float, buffer: float | None = None) -> Markup:
    """The parts one after another, of *total* bytes; *buffer* bytes at the end are shaded."""
    shapes = []
    if buffer:
        at = _WIDTH * (1 - min(1.0, buffer / total))
        shapes.append(_rect("buffer", at, _WIDTH - at))
    at = 0.0
    for part in parts:
        width = min(_WIDTH - at, _WIDTH * part.held / total)
        shapes.append(_rect(part.kind, at, width))
        at += width
    told = ", ".join(f"{part.name} {size(part.held)}" for part in parts)
    return tag(
        "svg",
        *shapes,
        cls="meter",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{told or 'nothing known'} of {size(total)}",
    )


def _rect(kind: str, at: float, width: float) -> Markup:
    return tag("rect", cls=kind, x=f"{at:.1f}", y=0, width=f"{width:.1f}", height=_HEIGHT)
