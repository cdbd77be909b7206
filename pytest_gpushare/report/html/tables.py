"""The parts of the page that are lists and tables of facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pytest_gpushare.report.html.data import MOST_EVENTS, colours
from pytest_gpushare.report.html.markup import (
    UNKNOWN,
    Markup,
    Part,
    clock,
    each,
    label,
    listed,
    meter,
    number,
    pairs,
    percent,
    severity,
    size,
    span,
    tag,
    texts,
)
from pytest_gpushare.units import plural

_SIGNS = {"bad": "▼", "warning": "◆", "neutral": "●"}


def events(document: Mapping[str, Any]) -> Markup:
    """What happened, with its times; the numbers are those on the timeline."""
    happened = each(document, "events")
    if not happened:
        return Markup("")
    rows = []
    for event in happened[:MOST_EVENTS]:
        state = severity(event.get("kind"))
        at = number(event.get("at_s"))
        rows.append(
            tag(
                "li",
                tag("button", clock(at), type="button", data_at=at, title="Show on the timeline"),
                tag("span", _SIGNS[state], cls="sign", aria_hidden="true"),
                tag("span", str(event.get("text") or event.get("kind")), cls="text"),
                tag("code", str(event.get("kind"))),
                cls=state,
            )
        )
    left = len(happened) - MOST_EVENTS
    more = [tag("p", f"{left} more are in the JSON report.")] if left > 0 else []
    count = tag("span", f"{len(happened):,}", cls="count")
    return tag(
        "section", tag("h2", "What happened", " ", count), tag("ol", *rows), *more, id="events"
    )


def leaks(document: Mapping[str, Any]) -> Markup:
    """Tests that left VRAM behind, the largest first."""
    found = sorted(each(document, "leaks"), key=lambda leak: -(number(leak.get("bytes")) or 0))
    if not found:
        return Markup("")
    rows = [
        [
            tag("bdi", _leaky(leak)),
            str(leak.get("worker") or UNKNOWN),
            tag("b", size(leak.get("bytes"))),
            str(leak.get("source") or UNKNOWN),
        ]
        for leak in found
    ]
    heads = ["test", "worker", "left", "measured by"]
    return tag(
        "section",
        tag("h2", "VRAM left behind"),
        _table("VRAM left behind", heads, rows),
        id="leaks",
    )


def _leaky(leak: Mapping[str, Any]) -> str:
    """The test, or those of which one it was."""
    if leak.get("nodeid"):
        return str(leak["nodeid"])
    suspects = texts(leak, "suspects")
    more = int(number(leak.get("suspects_count")) or len(suspects)) - len(suspects[:5])
    names = [*suspects[:5], *([f"{more} more"] if more > 0 else [])]
    return f"one of {listed(names)}" if suspects else UNKNOWN


def workers(document: Mapping[str, Any]) -> Markup:
    """Each worker: where it ran, and its peak against its slot."""
    found = each(document, "workers")
    if not found:
        return Markup("")
    names = {device.get("uuid"): label(device) for device in each(document, "devices")}
    rows: list[list[str]] = []
    for worker, colour in zip(found, colours(found), strict=True):
        kind = "cpu" if colour is None else f"worker-{colour}"
        slot, peak = number(worker.get("slot_bytes")), number(worker.get("peak_bytes"))
        allowed = max(slot or 0, number(worker.get("need_bytes")) or 0)
        share = Markup("")
        if allowed and peak is not None:
            share = meter([Part(kind, "peak", peak)], allowed)
        least = "at least " if worker.get("peak_exact") is False else ""
        device = worker.get("device")
        rows.append(
            [
                tag("span", tag("i", cls=f"swatch {kind}"), str(worker.get("id"))),
                str(names.get(device, device or "CPU")),
                size(slot) if slot else "–",
                tag("b", least, size(peak), data_bytes=peak) if slot else "–",
                tag("span", share, percent(peak, allowed) if allowed and peak is not None else ""),
                str(worker.get("peak_source") or ("–" if not slot else UNKNOWN)),
                "crashed" if worker.get("crashed") else span(_lived(worker)),
            ]
        )
    heads = ["worker", "where", "slot", "peak", "peak of slot or need", "measured by", "ran"]
    return tag("section", tag("h2", "Workers"), _table("Workers", heads, rows), id="workers")


def _lived(worker: Mapping[str, Any]) -> float | None:
    start, end = number(worker.get("started_s")), number(worker.get("ended_s"))
    return None if start is None or end is None else end - start


def ollama(document: Mapping[str, Any]) -> Markup:
    """What Ollama said of itself and of its models."""
    found = document.get("ollama")
    if not found:
        return Markup("")
    rows = [
        [
            tag("bdi", str(model.get("name"))),
            size(model.get("size_bytes")),
            size(model.get("size_vram_bytes")),
            "a part on the CPU" if model.get("spilled") else "whole on the GPU",
        ]
        for model in each(found, "models")
    ]
    return tag(
        "section",
        tag("h2", "Ollama"),
        *(tag("p", line) for line in texts(found, "verdict")),
        _table("Models", ["model", "size", "on the GPU", "at the end"], rows)
        if rows
        else Markup(""),
        pairs(
            [
                ("server", str(found.get("address") or UNKNOWN)),
                ("version", str(found.get("version") or UNKNOWN)),
                ("found by", str(found.get("found_by") or UNKNOWN)),
                ("problem", str(found.get("problem") or "")),
            ]
        ),
        id="ollama",
    )


def settings(document: Mapping[str, Any]) -> Markup:
    """The plan, and each setting with its origin; those that are not defaults first."""
    plan = document.get("plan") or {}
    held = plan.get("settings") or {}
    rows = [
        [tag("code", f"gpu_share_{key}"), str(setting.get("value")), str(setting.get("origin"))]
        for key, setting in sorted(
            held.items(), key=lambda item: (item[1].get("origin") == "default", item[0])
        )
    ]
    run = document.get("run") or {}
    return tag(
        "section",
        tag("h2", "Plan and settings"),
        pairs(
            [
                ("GPU workers", str(plan.get("gpu_workers", UNKNOWN))),
                ("CPU workers", str(plan.get("cpu_workers", UNKNOWN))),
                ("limited by", ", ".join(texts(plan, "limited_by")) or "nothing"),
                ("presets", ", ".join(texts(plan, "presets")) or "none"),
                ("needed for a worker", size(plan.get("needed_bytes"))),
                ("no GPU because", str(plan.get("absence") or "")),
                ("platform", str(run.get("platform") or UNKNOWN)),
            ]
        ),
        tag(
            "details",
            tag("summary", plural(len(rows), "setting")),
            _table("Settings", ["setting", "value", "from"], rows),
        )
        if rows
        else Markup(""),
        id="settings",
    )


def terminal_text(document: Mapping[str, Any]) -> Markup:
    """What the terminal said."""
    lines = texts(document, "summary")
    if not lines:
        return Markup("")
    return tag(
        "section",
        tag("details", tag("summary", "What the terminal said"), tag("pre", "\n".join(lines))),
        id="terminal",
    )


def _table(name: str, heads: list[str], rows: Iterable[Iterable[str]]) -> Markup:
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
