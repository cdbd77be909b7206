"""The report as one HTML page, made from the report document; it needs no network.

Python writes what can be read without scripts: the verdict, devices, workers, events, leaks and
settings. The page's own script draws the timeline, with uPlot, and the table of tests.
"""

from __future__ import annotations

import json

from pytest_gpushare.report.html import sections
from pytest_gpushare.report.html.data import colours, data, holders
from pytest_gpushare.report.html.markup import (
    Edges,
    Markup,
    Part,
    Record,
    asset,
    clock,
    code,
    generator,
    kept_by_server,
    label,
    meter,
    pairs,
    peak_text,
    size,
    tag,
    tests_peak,
    whole,
)
from pytest_gpushare.report.html.sections import Answer, answers, outcome, subtitle, title
from pytest_gpushare.units import plural

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


def page(report: Record) -> str:
    """The HTML of a report document of schema version 1; the same for the same document.

    Text of the document, such as node ids, is escaped. Scripts and styles are allowed by their
    hashes alone, and everything that would reach out is forbidden. The text can be written as
    UTF-8 whatever the names are.
    """
    # The licence asks to go wherever the library goes.
    library = f"/*!\n{asset('uPlot.LICENSE.txt')}*/\n{asset('uPlot.iife.min.js')}"
    own = "".join(asset(name) for name in _SCRIPTS)
    # Nothing of ours in the page's global names.
    own = f'(() => {{\n"use strict";\n{own}}})();\n'
    # In a script of data only "<" could end it; JSON has an escape for it.
    held = json.dumps(data(report), separators=(",", ":"), allow_nan=False)
    embedded = Markup(held.replace("<", "\\u003c"))
    content = [body(report), tag("script", embedded, type="application/json", id="data")]
    return whole(title(report), _STYLES, content, [library, own], generator(report))


_NAMES = {"ollama": "Ollama", "others": "others", "rest": "unattributed"}
_HANGING = ("ollama", "server")

# Samples before and after the fullest one, to attribute VRAM to its owners.
_AROUND = 20


def meters(report: Record) -> Markup:
    """A bar for each device: what it held at its fullest moment."""
    if not report["devices"]:
        return Markup("")
    measured = any(device["peak_used_bytes"] is not None for device in report["devices"])
    return tag(
        "section",
        tag("h2", "At the fullest moment" if measured else "As it was planned"),
        *[_meter(report, device) for device in report["devices"]],
        id="devices",
    )


def _meter(report: Record, device: Record) -> Markup:
    total, peak = device["total_bytes"], device["peak_used_bytes"]
    most = peak_text(peak, device["peak_used_exact"])
    at, parts = _fullest(report, device)
    if not parts and peak:
        parts = [Part("rest", "in use", peak)]
    when = f" at {clock(at)}" if at is not None else ""
    return tag(
        "article",
        tag("h3", tag("b", label(device)), " ", device["name"]),
        tag(
            "p",
            tag("b", most, data_bytes=peak),
            f" of {size(total)} used{when}" if peak is not None else f" used of {size(total)}",
            cls="figure",
        ),
        _bar(device, parts, total) if total else Markup(""),
        _key(parts, total, peak),
        pairs(
            [
                ("free at the start", size(device["free_at_start_bytes"])),
                *(
                    row
                    for kept in kept_by_server(device)
                    for row in (
                        (f"kept for {kept.name}", size(kept.reservation)),
                        ("of it resident", size(kept.resident)),
                    )
                ),
                ("safety buffer", size(device["safety_buffer_bytes"])),
                ("budget of tests", size(device["budget_bytes"])),
                ("most held by tests", tests_peak(device)),
            ]
        ),
        cls="device",
    )


def _bar(device: Record, parts: list[Part], total: float) -> Markup:
    """As the timeline has it: Ollama and other servers at one end, all others at the other."""
    hanging = [part for part in parts if part.kind in _HANGING]
    told = {part.name for part in hanging}
    # Of a server that has no part of its own what it holds is among the others.
    resident = sum(kept.resident for kept in kept_by_server(device) if kept.name not in told)
    edges = Edges(max(0, device["reservation_bytes"] - resident), device["safety_buffer_bytes"])
    return meter([part for part in parts if part not in hanging], total, hanging, edges)


def _fullest(report: Record, device: Record) -> tuple[float | None, list[Part]]:
    """The moment at which the device was fullest, and who held what."""
    held = report["samples"]["devices"].get(device["uuid"])
    if held is None or not any(held["used_bytes"]):
        return None, []
    used, workers = held["used_bytes"], report["workers"]
    index = used.index(max(used))
    around = range(max(0, index - _AROUND), min(len(used), index + _AROUND + 1))
    columns = holders(held, around, device["total_bytes"], workers)
    there = around.index(index)
    numbers = dict(zip((worker["id"] for worker in workers), colours(workers), strict=True))
    parts = [
        Part(
            f"worker-{numbers.get(name) or 0}" if kind == "worker" else kind,
            _NAMES.get(kind, name),
            values[there] or 0,
        )
        for kind, name, values in columns.parts
    ]
    return columns.times[there], [part for part in parts if part.held > 0]


def _key(parts: list[Part], total: int, peak: int | None) -> Markup:
    if not parts:
        return Markup("")
    free = [Part("free", "free", total - peak)] if total and peak is not None else []
    ends = [part for part in parts if part.kind in _HANGING]
    items = [
        tag("li", tag("i", cls=f"swatch {part.kind}"), f"{part.name} {size(part.held)}")
        for part in [*(part for part in parts if part not in ends), *free, *ends]
    ]
    return tag("ul", *items, cls="key")


_ALONE = "This page is one file and asks no network."

# What a verdict shows before the reader asks for more.
_FIRST = 3

_SIGNS = {"good": "✓", "warning": "!", "bad": "✕", "neutral": "i"}
_MEANT = {"good": "good", "warning": "look at this", "bad": "bad", "neutral": "for information"}


def body(report: Record) -> Markup:
    """All that stands in the page before its scripts."""
    return Markup("\n").join(
        [
            tag("a", "Skip to the tests", cls="skip", href="#tests"),
            _header(report),
            tag(
                "main",
                *filter(
                    None,
                    [
                        _verdict(report),
                        meters(report),
                        _timeline(report),
                        sections.events(report),
                        _tests(report),
                        sections.leaks(report),
                        sections.hosts(report),
                        sections.workers(report),
                        sections.ollama(report),
                        sections.settings(report),
                        sections.terminal_text(report),
                    ],
                ),
            ),
            tag("footer", f"Made by {generator(report)}. {_ALONE}"),
        ]
    )


def _header(report: Record) -> Markup:
    state, text = outcome(report)
    return tag(
        "header",
        tag("p", "GPU share report", cls="eyebrow"),
        tag("h1", tag("span", _SIGNS[state], cls=f"sign {state}", aria_hidden="true"), " ", text),
        tag("p", subtitle(report), cls="subtitle"),
    )


def _verdict(report: Record) -> Markup:
    return tag(
        "section",
        tag("h2", "Verdict", cls="unseen"),
        *map(_answer, answers(report)),
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
    return tag("ul", *[tag("li", code(text)) for text in texts])


def _timeline(report: Record) -> Markup:
    """What the page's script fills."""
    is_empty = not report["tests"] and not report["devices"]
    return Markup("" if is_empty else asset("timeline.html"))


def _tests(report: Record) -> Markup:
    """The same for the table of tests."""
    count = len(report["tests"])
    if not count:
        return tag("section", tag("h2", "Tests"), tag("p", "No test ran."), id="tests")
    words = {"{count}": f"{count:,}", "{tests}": plural(count, "test")}
    section = asset("tests.html")
    for name, word in words.items():
        section = section.replace(name, word)
    return Markup(section)
