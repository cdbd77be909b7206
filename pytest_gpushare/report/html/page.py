"""The report as one HTML page, made from the report document; it needs no network.

Python writes what can be read without scripts: the verdict, devices, workers, events, leaks and
settings. The page's own script draws the timeline, with uPlot, and the table of tests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_gpushare.report.html import tables
from pytest_gpushare.report.html.data import colours, data, holders
from pytest_gpushare.report.html.markup import (
    Edges,
    Markup,
    Part,
    clock,
    each,
    label,
    meter,
    number,
    pairs,
    size,
    tag,
    tests_peak,
)
from pytest_gpushare.report.html.verdict import Answer, answers, outcome, subtitle, title
from pytest_gpushare.units import plural

_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = (
    "words.js",
    "tests.js",
    "table.js",
    "timeline.js",
    "plot.js",
    "vram.js",
    "bars.js",
    "page.js",
)
_STYLES = ("uPlot.min.css", "page.css", "media.css")


def page(document: Mapping[str, Any]) -> str:
    """The HTML of a report document of schema version 1; the same for the same document.

    Text of the document, such as node ids, is escaped. Scripts and styles are allowed by their
    hashes alone, and everything that would reach out is forbidden. The text can be written as
    UTF-8 whatever the names are.
    """
    style = "".join(map(_asset, _STYLES))
    # The licence asks to go wherever the library goes.
    library = f"/*!\n{_asset('uPlot.LICENSE.txt')}*/\n{_asset('uPlot.iife.min.js')}"
    own = "".join(_asset(name) for name in _SCRIPTS)
    # Nothing of ours in the page's global names.
    own = f'(() => {{\n"use strict";\n{own}}})();\n'
    scripts = [library, own]
    head = Markup("").join(
        [
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, scripts)),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("meta", name="generator", content=_generator(document)),
            tag("title", title(document)),
            # Without it a browser asks the server that the page came from.
            tag("link", rel="icon", href="data:,"),
            tag("style", Markup(style)),
        ]
    )
    # In a script of data only "<" could end it; JSON has an escape for it.
    held = json.dumps(data(document), separators=(",", ":"), allow_nan=False)
    content = Markup("").join(
        [
            body(document),
            tag("script", Markup(held.replace("<", "\\u003c")), type="application/json", id="data"),
            *(tag("script", Markup(script)) for script in scripts),
        ]
    )
    return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', content), lang='en')}\n"


def _policy(style: str, scripts: list[str]) -> str:
    allowed = " ".join(map(_hash, scripts))
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _generator(document: Mapping[str, Any]) -> str:
    generator = document.get("generator") or {}
    return f"{generator.get('name', 'pytest-gpushare')} {generator.get('version', '')}".strip()


_NAMES = {"ollama": "Ollama", "others": "others", "rest": "unattributed"}

# Samples before and after the fullest one, to attribute VRAM to its owners.
_AROUND = 20


def meters(document: Mapping[str, Any]) -> Markup:
    """A bar for each device: what it held at its fullest moment."""
    devices = each(document, "devices")
    if not devices:
        return Markup("")
    measured = any(number(device.get("peak_used_bytes")) is not None for device in devices)
    return tag(
        "section",
        tag("h2", "At the fullest moment" if measured else "As it was planned"),
        *(_meter(document, device) for device in devices),
        id="devices",
    )


def _meter(document: Mapping[str, Any], device: Mapping[str, Any]) -> Markup:
    total, peak = number(device.get("total_bytes")), number(device.get("peak_used_bytes"))
    at, parts = _fullest(document, device)
    if not parts and peak:
        parts = [Part("rest", "in use", peak)]
    when = f" at {clock(at)}" if at is not None else ""
    return tag(
        "article",
        tag("h3", tag("b", label(device)), " ", str(device.get("name") or "")),
        tag(
            "p",
            tag("b", size(peak), data_bytes=peak),
            f" of {size(total)} used{when}" if peak is not None else f" used of {size(total)}",
            cls="figure",
        ),
        _bar(device, parts, total) if total else Markup(""),
        _key(parts, total, peak),
        pairs(
            [
                ("free at the start", size(device.get("free_at_start_bytes"))),
                ("kept for Ollama", size(device.get("reservation_bytes"))),
                ("of it resident", size(device.get("resident_bytes"))),
                ("safety buffer", size(device.get("safety_buffer_bytes"))),
                ("budget of tests", size(device.get("budget_bytes"))),
                ("most held by tests", tests_peak(device)),
            ]
        ),
        cls="device",
    )


def _bar(device: Mapping[str, Any], parts: list[Part], total: float) -> Markup:
    """As the timeline has it: Ollama at one end, all others at the other."""
    ollama = next((part for part in parts if part.kind == "ollama"), None)
    reservation = number(device.get("reservation_bytes")) or 0
    resident = 0 if ollama else number(device.get("resident_bytes")) or 0
    buffer = number(device.get("safety_buffer_bytes")) or 0
    edges = Edges(max(0, reservation - resident), buffer)
    return meter([part for part in parts if part is not ollama], total, ollama, edges)


def _fullest(
    document: Mapping[str, Any], device: Mapping[str, Any]
) -> tuple[float | None, list[Part]]:
    """The moment at which the device was fullest, and who held what."""
    held = ((document.get("samples") or {}).get("devices") or {}).get(device.get("uuid")) or {}
    used = [number(value) for value in held.get("used_bytes") or ()]
    if not any(used):
        return None, []
    index = max(range(len(used)), key=lambda at: used[at] or 0)
    times = held.get("at_s") or ()
    around = [
        at
        for at in range(max(0, index - _AROUND), min(len(times), index + _AROUND + 1))
        if number(times[at]) is not None
    ]
    if index not in around:
        return None, []
    workers = each(document, "workers")
    shown = holders(held, around, number(device.get("total_bytes")), workers)
    there = around.index(index)
    numbers = dict(
        zip((str(worker.get("id")) for worker in workers), colours(workers), strict=True)
    )
    parts = [
        Part(
            f"worker-{numbers.get(name) or 0}" if kind == "worker" else kind,
            _NAMES.get(kind, name),
            values[there] or 0,
        )
        for kind, name, values in shown.parts
    ]
    return shown.times[there], [part for part in parts if part.held > 0]


def _key(parts: list[Part], total: float | None, peak: float | None) -> Markup:
    if not parts:
        return Markup("")
    free = [Part("free", "free", total - peak)] if total and peak is not None else []
    ends = [part for part in parts if part.kind == "ollama"]
    items = [
        tag("li", tag("i", cls=f"swatch {part.kind}"), f"{part.name} {size(part.held)}")
        for part in [*(part for part in parts if part not in ends), *free, *ends]
    ]
    return tag("ul", *items, cls="key")


# What a verdict shows before the reader asks for more.
_FIRST = 3

_SIGNS = {"good": "✓", "warning": "!", "bad": "✕", "neutral": "i"}
_MEANT = {"good": "good", "warning": "look at this", "bad": "bad", "neutral": "for information"}


def body(document: Mapping[str, Any]) -> Markup:
    """All that stands in the page before its scripts."""
    return Markup("\n").join(
        [
            tag("a", "Skip to the tests", cls="skip", href="#tests"),
            _header(document),
            tag(
                "main",
                *filter(
                    None,
                    [
                        _verdict(document),
                        meters(document),
                        _timeline(document),
                        tables.events(document),
                        _tests(document),
                        tables.leaks(document),
                        tables.workers(document),
                        tables.ollama(document),
                        tables.settings(document),
                        tables.terminal_text(document),
                    ],
                ),
            ),
            tag("footer", f"{_maker(document)}. This page is one file and asks no network."),
        ]
    )


def _header(document: Mapping[str, Any]) -> Markup:
    state, text = outcome(document)
    return tag(
        "header",
        tag("p", "GPU share report", cls="eyebrow"),
        tag("h1", tag("span", _SIGNS[state], cls=f"sign {state}", aria_hidden="true"), " ", text),
        tag("p", subtitle(document), cls="subtitle"),
    )


def _verdict(document: Mapping[str, Any]) -> Markup:
    return tag(
        "section",
        tag("h2", "Verdict", cls="unseen"),
        *map(_answer, answers(document)),
        id="verdict",
    )


def _answer(answer: Answer) -> Markup:
    first, more = answer.details[:_FIRST], answer.details[_FIRST:]
    return tag(
        "article",
        tag("h3", answer.question),
        tag(
            "p",
            tag("span", _SIGNS[answer.state], cls="sign", aria_hidden="true"),
            tag("span", f"{_MEANT[answer.state]}: ", cls="unseen"),
            answer.answer,
            cls="answer",
        ),
        _list(first),
        tag("details", tag("summary", f"{len(more)} more"), _list(more)) if more else Markup(""),
        cls=answer.state,
    )


def _list(texts: list[str]) -> Markup:
    if not texts:
        return Markup("")
    return tag("ul", *(tag("li", code(text)) for text in texts))


def code(text: str) -> Markup:
    """The text with what stands between backticks as code."""
    parts = re.split(r"`([^`]+)`", text)
    return Markup("").join(
        tag("code", part) if index % 2 else part for index, part in enumerate(parts)
    )


def _timeline(document: Mapping[str, Any]) -> Markup:
    if not each(document, "tests") and not each(document, "devices"):
        return Markup("")
    buttons = [
        ("in", "+", "Zoom in"),
        ("out", "−", "Zoom out"),
        ("back", "‹", "Earlier"),
        ("on", "›", "Later"),
        ("all", "Whole run", "Show the whole run"),
    ]
    return tag(
        "section",
        tag("h2", "Timeline"),
        tag(
            "div",
            tag(
                "p",
                "Tests stand on the ground, Ollama hangs from the ceiling; between them is what is "
                "free. Drag to zoom, double-click for the whole run; keys: arrows, + and −, 0.",
                cls="hint",
            ),
            tag(
                "div",
                *(
                    tag("button", sign, type="button", data_zoom=name, title=what, aria_label=what)
                    for name, sign, what in buttons
                ),
                cls="buttons",
                role="group",
                aria_label="Zoom",
            ),
            cls="bar",
        ),
        tag("div", id="charts"),
        tag("p", id="moment", role="status", cls="unseen"),
        _without_script("The timeline"),
        id="timeline",
    )


def _tests(document: Mapping[str, Any]) -> Markup:
    count = len(each(document, "tests"))
    if not count:
        return tag("section", tag("h2", "Tests"), tag("p", "No test ran."), id="tests")
    return tag(
        "section",
        tag("h2", "Tests", " ", tag("span", f"{count:,}", cls="count")),
        tag(
            "div",
            tag(
                "input",
                type="search",
                id="find",
                placeholder="Find by name",
                aria_label="Find tests by name",
            ),
            tag(
                "select", tag("option", "Any outcome", value=""), id="outcome", aria_label="Outcome"
            ),
            tag("select", tag("option", "Any worker", value=""), id="worker", aria_label="Worker"),
            tag(
                "label",
                tag("input", type="checkbox", id="in-view"),
                " only in the timeline's view",
                cls="check",
            ),
            cls="bar filters",
        ),
        tag("div", tag("table", id="test-table"), cls="scroll"),
        tag("p", id="shown", role="status"),
        tag(
            "div",
            tag("button", "Show more", type="button", id="more"),
            tag("button", "Show all", type="button", id="every"),
            cls="buttons",
        ),
        _without_script(f"The table of {plural(count, 'test')}"),
        id="tests",
    )


def _without_script(what: str) -> Markup:
    return tag("noscript", tag("p", f"{what} needs JavaScript; the rest of the page does not."))


def _maker(document: Mapping[str, Any]) -> str:
    generator = document.get("generator") or {}
    return (
        f"Made by {generator.get('name', 'pytest-gpushare')} {generator.get('version', '')}".strip()
    )
