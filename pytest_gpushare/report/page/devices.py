"""What each device held at its fullest moment, as a bar and in figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_gpushare.report.page.data import colours
from pytest_gpushare.report.page.holders import holders
from pytest_gpushare.report.page.markup import Markup, pairs, tag
from pytest_gpushare.report.page.meter import Edges, Part, meter
from pytest_gpushare.report.page.words import clock, each, label, number, size

_NAMES = {"ollama": "Ollama", "others": "others", "rest": "not told apart"}

# Samples before and after the fullest one, to tell apart who held what.
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
                ("most held by tests", size(device.get("peak_workers_bytes"))),
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
    told = holders(held, around, number(device.get("total_bytes")), workers)
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
        for kind, name, values in told.parts
    ]
    return told.times[there], [part for part in parts if part.held > 0]


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
