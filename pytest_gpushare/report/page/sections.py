"""The parts of the page, top to bottom."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pytest_gpushare.report.page import devices, facts
from pytest_gpushare.report.page.markup import Markup, tag
from pytest_gpushare.report.page.verdict import Answer, answers, outcome, subtitle
from pytest_gpushare.report.page.words import each
from pytest_gpushare.units import plural

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
                        devices.meters(document),
                        _timeline(document),
                        facts.events(document),
                        _tests(document),
                        facts.leaks(document),
                        facts.workers(document),
                        facts.ollama(document),
                        facts.settings(document),
                        facts.told(document),
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
