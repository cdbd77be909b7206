"""The elements of a page, escaped as they are made, its frame, and how figures are written on it.

The script's `words` write figures in the same way.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from pytest_gpushare.units import at_least, format_gb

UNKNOWN = "unknown"

Record = Mapping[str, Any]
"""The report document, or an object in it, as report-schema.json describes it."""

_BAD = frozenset(
    {"ollama-spilled", "ollama-unreachable", "worker-crashed", "placement-overwritten", "oom"}
)
_WARNING = frozenset({"ollama-unloaded", "ollama-reloaded", "pressure", "leak"})


def size(held: float | None) -> str:
    """`4.5 GB`, `600 MB` below a tenth of a GB, or `unknown`; bytes."""
    return UNKNOWN if held is None else format_gb(round(held))


def span(seconds: float | None) -> str:
    """`4 ms`, `0.25 s`, `12.3 s`, `3 min 20 s`, `2 h 05 min`, or `unknown`; seconds."""
    if seconds is None:
        return UNKNOWN
    if seconds < 0.1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def clock(seconds: float | None) -> str:
    """A moment of the run: `0:03.2`, `12:05.0` or `3:20:05`; seconds since its start."""
    if seconds is None:
        return UNKNOWN
    if seconds < 3600:
        tenths = int(seconds * 10)
        return f"{tenths // 600}:{tenths // 10 % 60:02d}.{tenths % 10}"
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def percent(part: float, whole: float) -> str:
    """`89 %`, rounded down, so that only the whole is called 100 %."""
    return f"{int(100 * part // whole)} %"


def listed(names: list[str], most: int = 6) -> str:
    """`a`, `a and b`, `a, b and c`, or `a, b, c and 9 more`."""
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def peak_text(held: float | None, exact: bool | None) -> str:
    """`4.5 GB`, `at least 4.5 GB` for a lower bound, or `unknown`."""
    return f"{at_least(exact)}{size(held)}"


def label(device: Record) -> str:
    """`GPU 0` or `box GPU 0`, as the terminal has it."""
    name, host = f"GPU {device['index']}", device.get("host")
    return f"{host} {name}" if host else name


class Kept(NamedTuple):
    """What of a device the plan keeps for one server; bytes."""

    name: str
    reservation: int
    resident: int
    """What of it the server held already."""


def kept_by_server(device: Record) -> list[Kept]:
    """What is kept for each server: Ollama first, then the others that have something."""
    others = [
        Kept(visible(name), share["reservation_bytes"], share["resident_bytes"])
        for name, share in device.get("servers", {}).items()
    ]
    reservation = device["reservation_bytes"] - sum(each.reservation for each in others)
    resident = device["resident_bytes"] - sum(each.resident for each in others)
    return [Kept("Ollama", max(0, reservation), max(0, resident)), *others]


def lasted(start: float | None, end: float | None) -> float | None:
    """Seconds from a start to an end; None where one is unknown."""
    return None if start is None or end is None else end - start


def generator(report: Record) -> str:
    """`pytest-gpushare 0.2.0`."""
    return "{name} {version}".format_map(report["generator"])


def tests_peak(device: Record) -> str:
    """What the tests held at most: `at least 7.4 GB (3.9 GB of it unattributed)`."""
    held, left = device["peak_tests_bytes"], device["peak_unattributed_bytes"] or 0
    if held is None or 20 * left <= held:
        return peak_text(held, device["peak_tests_exact"])
    return f"at least {size(held)} ({size(left)} of it unattributed)"


def severity(kind: str) -> str:
    """`bad`, `warning` or `neutral`; kinds that a later version adds are neutral."""
    return "bad" if kind in _BAD else "warning" if kind in _WARNING else "neutral"


# Elements that have no end.
_VOID = frozenset({"input", "link", "meta", "wbr"})

# Control characters but for the tab and the end of a line, separators, marks that change the
# direction of writing, and surrogates, which UTF-8 cannot express.
_HIDDEN = {
    code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    for first, last in (
        (0x00, 0x08),
        (0x0B, 0x1F),
        (0x7F, 0x9F),
        (0x200E, 0x200F),
        (0x2028, 0x202E),
        (0x2066, 0x2069),
        (0xD800, 0xDFFF),
    )
    for code in range(first, last + 1)
}


class Markup(str):
    """Text that is HTML as it stands."""

    __slots__ = ()

    def join(self, parts: Iterable[str]) -> Markup:
        """The parts one after another; those that are plain text are escaped."""
        return Markup(str.join(self, map(_safe, parts)))


def tag(_name: str, *content: str, **attributes: object) -> Markup:
    """An element; `cls` is the class, `_` in names is `-`, and None or False leaves one out."""
    written = "".join(
        f" {_attribute(name)}" + ("" if value is True else f'="{_safe(str(value))}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    if _name in _VOID:
        return Markup(f"<{_name}{written}>")
    return Markup(f"<{_name}{written}>{''.join(map(_safe, content))}</{_name}>")


def _attribute(name: str) -> str:
    return "class" if name == "cls" else name.replace("_", "-")


def visible(text: str) -> str:
    """The text with what would hide or turn round its neighbours written as an escape."""
    return text.translate(_HIDDEN)


def _safe(text: str) -> str:
    return text if isinstance(text, Markup) else escape(visible(text), quote=True)


def breakable(name: str) -> list[str]:
    """The parts of a name that may be broken after each `_` and `/`."""
    return [piece for part in re.split(r"(?<=[_/])", name) for piece in (part, tag("wbr"))]


def code(text: str) -> Markup:
    """The text with what stands between backticks as code; a setting may be broken at each `_`."""
    pieces: list[str] = []
    for at, part in enumerate(re.split(r"`([^`]+)`", text)):
        if at % 2:
            pieces.append(tag("code", part))
            continue
        for index, word in enumerate(re.split(r"(gpu_share_\w+)", part)):
            pieces += breakable(word) if index % 2 else [word]
    return Markup("").join(pieces)


def pairs(held: Iterable[tuple[str, str]]) -> Markup:
    """A list of names and values, without those that have no value."""
    return tag(
        "dl",
        *(tag("div", tag("dt", name), tag("dd", value)) for name, value in held if value),
    )


def table(name: str, heads: list[str], rows: Iterable[Iterable[str]]) -> Markup:
    """A table that scrolls where it is too wide."""
    return tag(
        "div",
        tag(
            "table",
            tag("thead", tag("tr", *(tag("th", head, scope="col") for head in heads))),
            tag("tbody", *(tag("tr", *(tag("td", cell) for cell in row)) for row in rows)),
        ),
        cls="scroll",
        # It scrolls on small screens, and then by the keyboard too.
        tabindex=0,
        role="region",
        aria_label=name,
    )


_WIDTH, _HEIGHT = 1000, 24


class Part(NamedTuple):
    """A part of a bar."""

    kind: str
    """Its class in the stylesheet: `ollama`, `server`, `others`, `rest`, `cpu`, `worker-0` ..."""
    name: str
    held: float
    """Bytes."""


class Edges(NamedTuple):
    """What a plan keeps at the right end of a bar, in bytes."""

    kept: float
    """For Ollama and other servers, at the very end."""
    buffer: float
    """Free, before it."""


def meter(
    parts: Sequence[Part],
    total: float,
    hanging: Sequence[Part] = (),
    edges: Edges | None = None,
) -> Markup:
    """The parts one after another from the left, *hanging* from the right end, of *total* bytes."""
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
    end = float(_WIDTH)
    for part in hanging:
        width = min(end - at, _WIDTH * part.held / total)
        end -= width
        shapes.append(_rect(part.kind, end, width))
    words = ", ".join(f"{part.name} {size(part.held)}" for part in (*parts, *hanging))
    return tag(
        "svg",
        *shapes,
        cls="meter",
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{words or 'nothing known'} of {size(total)}",
    )


def _rect(kind: str, at: float, width: float) -> Markup:
    return tag("rect", cls=kind, x=f"{at:.1f}", y=0, width=f"{width:.1f}", height=_HEIGHT)


_ASSETS = Path(__file__).parent / "assets"


def whole(
    title: str,
    styles: Iterable[str],
    content: Sequence[str],
    scripts: Sequence[str] = (),
    generator: str | None = None,
) -> str:
    """A page: its head, its content, and scripts at its end; `styles` are names of assets.

    Scripts and styles are allowed by their hashes alone, and everything that would reach out is
    forbidden.
    """
    style = "".join(map(asset, styles))
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, scripts)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        *([tag("meta", name="generator", content=generator)] if generator is not None else []),
        tag("title", title),
        # Without it a browser asks the server that the page came from.
        tag("link", rel="icon", href="data:,"),
        tag("style", Markup(style)),
    ]
    body = [*content, *(tag("script", Markup(script)) for script in scripts)]
    return f"<!doctype html>\n{tag('html', tag('head', *head), tag('body', *body), lang='en')}\n"


def _policy(style: str, scripts: Iterable[str]) -> str:
    """The Content-Security-Policy that allows these texts and nothing else."""
    allowed = " ".join(map(_hash, scripts)) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def asset(name: str) -> str:
    """The text of a file of the page's assets."""
    return (_ASSETS / name).read_text(encoding="utf-8")
