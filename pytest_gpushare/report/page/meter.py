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


class Edges(NamedTuple):
    """What a plan keeps at the right end of a bar, in bytes."""

    kept: float
    """For Ollama, at the very end."""
    buffer: float
    """Free, before it."""


def meter(
    parts: Sequence[Part], total: float, hanging: Part | None = None, edges: Edges | None = None
) -> Markup:
    """The parts one after another from the left, *hanging* at the right end, of *total* bytes."""
    shapes = []
    if edges:
        kept = min(edges.kept, total)
        buffer = min(edges.buffer, total - kept)
        shapes.append(_rect("kept", _WIDTH * (1 - kept / total), _WIDTH * kept / total))
        at = _WIDTH * (1 - (kept + buffer) / total)
        shapes.append(_rect("buffer", at, _WIDTH * buffer / total))
    at = 0.0
    for part in parts:
        width = min(_WIDTH - at, _WIDTH * part.held / total)
        shapes.append(_rect(part.kind, at, width))
        at += width
    if hanging:
        width = min(_WIDTH - at, _WIDTH * hanging.held / total)
        shapes.append(_rect(hanging.kind, _WIDTH - width, width))
    every = [*parts, *([hanging] if hanging else [])]
    told = ", ".join(f"{part.name} {size(part.held)}" for part in every)
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
