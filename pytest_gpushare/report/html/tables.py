"""The parts of the page that are lists and tables of facts."""

from __future__ import annotations

from collections import Counter

from pytest_gpushare.report.html.data import MOST_EVENTS, colours
from pytest_gpushare.report.html.markup import (
    UNKNOWN,
    Markup,
    Part,
    breakable,
    clock,
    listed,
    meter,
    pairs,
    peak_text,
    percent,
    severity,
    size,
    span,
    table,
    tag,
)
from pytest_gpushare.report.html.shown import Shown, ShownLeak
from pytest_gpushare.units import plural

_SIGNS = {"bad": "▼", "warning": "◆", "neutral": "●"}


def events(report: Shown) -> Markup:
    """What happened, with its times; the numbers are those on the timeline."""
    happened = report.events
    if not happened:
        return Markup("")
    rows = []
    for event in happened[:MOST_EVENTS]:
        state, at = severity(event.kind), event.at_s
        rows.append(
            tag(
                "li",
                tag("button", clock(at), type="button", data_at=at, title="Show on the timeline"),
                tag("span", _SIGNS[state], cls="sign", aria_hidden="true"),
                tag("span", event.text or event.kind, cls="text"),
                tag("code", event.kind),
                cls=state,
            )
        )
    left = len(happened) - MOST_EVENTS
    more = [tag("p", f"{left} more are in the JSON report.")] if left > 0 else []
    count = tag("span", f"{len(happened):,}", cls="count")
    return tag(
        "section", tag("h2", "What happened", " ", count), tag("ol", *rows), *more, id="events"
    )


def leaks(report: Shown) -> Markup:
    """Tests that left VRAM behind, the largest first."""
    found = sorted(report.leaks, key=lambda leak: -(leak.bytes or 0))
    if not found:
        return Markup("")
    rows = [
        [
            tag("bdi", _leaky(leak)),
            leak.worker or UNKNOWN,
            tag("b", size(leak.bytes)),
            leak.source or UNKNOWN,
        ]
        for leak in found
    ]
    heads = ["test", "worker", "left", "measured by"]
    return tag(
        "section",
        tag("h2", "VRAM left behind"),
        table("VRAM left behind", heads, rows),
        id="leaks",
    )


def _leaky(leak: ShownLeak) -> str:
    """The test, or those of which one it was."""
    if leak.nodeid or not leak.suspects:
        return leak.nodeid or UNKNOWN
    more = int(leak.suspects_count or len(leak.suspects)) - len(leak.suspects[:5])
    names = [*leak.suspects[:5], *([f"{more} more"] if more > 0 else [])]
    return f"one of {listed(names)}"


def hosts(report: Shown) -> Markup:
    """Each host of a run on several: its workers, their tests, and what went wrong there."""
    if not report.hosts:
        return Markup("")
    of = {worker.id: worker.host for worker in report.workers}
    ran = Counter(of.get(test.worker, "") for test in report.tests)
    rows = [
        [
            tag("bdi", host.name or "this host"),
            _count(host.gpu_workers),
            _count(host.cpu_workers),
            f"{ran[host.name]:,}",
            host.python or report.run.python or UNKNOWN,
            tag("b", "lost: ", host.lost) if host.lost else host.shortage,
        ]
        for host in report.hosts
    ]
    heads = ["host", "GPU workers", "CPU workers", "tests", "Python", "problem"]
    return tag("section", tag("h2", "Hosts"), table("Hosts", heads, rows), id="hosts")


def workers(report: Shown) -> Markup:
    """Each worker: where it ran, and its peak against its slot."""
    found = report.workers
    if not found:
        return Markup("")
    names = {device.uuid: device.label for device in report.devices}
    rows: list[list[str]] = []
    for worker, colour in zip(found, colours(found), strict=True):
        kind = "cpu" if colour is None else f"worker-{colour}"
        slot, peak, device = worker.slot_bytes, worker.peak_bytes, worker.device
        allowed = max(slot or 0, worker.need_bytes or 0)
        share = Markup("")
        if allowed and peak is not None:
            share = meter([Part(kind, "peak", peak)], allowed)
        rows.append(
            [
                tag("span", tag("i", cls=f"swatch {kind}"), worker.id),
                names.get(device or "", device or "CPU"),
                size(slot) if slot else "–",
                tag("b", peak_text(peak, worker.peak_exact), data_bytes=peak) if slot else "–",
                tag("span", share, percent(peak, allowed) if allowed and peak is not None else ""),
                worker.peak_source or (UNKNOWN if slot else "–"),
                "crashed" if worker.crashed else span(worker.lived),
            ]
        )
    heads = ["worker", "where", "slot", "peak", "peak of slot or need", "measured by", "ran"]
    return tag("section", tag("h2", "Workers"), table("Workers", heads, rows), id="workers")


def ollama(report: Shown) -> Markup:
    """What Ollama said of itself and of its models."""
    found = report.ollama
    if found is None:
        return Markup("")
    rows = [
        [
            tag("bdi", model.name),
            size(model.size_bytes),
            size(model.size_vram_bytes),
            "a part on the CPU" if model.spilled else "whole on the GPU",
        ]
        for model in report.models
    ]
    return tag(
        "section",
        tag("h2", "Ollama"),
        *(tag("p", line) for line in found.verdict),
        table("Models", ["model", "size", "on the GPU", "at the end"], rows)
        if rows
        else Markup(""),
        pairs(
            [
                ("server", found.address or UNKNOWN),
                ("version", found.version or UNKNOWN),
                ("found by", found.found_by or UNKNOWN),
                ("problem", found.problem),
            ]
        ),
        id="ollama",
    )


def settings(report: Shown) -> Markup:
    """The plan, and each setting with its origin; those that are not defaults first."""
    plan = report.plan
    rows = [
        [
            tag("code", *breakable(f"gpu_share_{key}")),
            str(setting.get("value")),
            str(setting.get("origin")),
        ]
        for key, setting in sorted(
            plan.settings.items(), key=lambda item: (item[1].get("origin") == "default", item[0])
        )
    ]
    return tag(
        "section",
        tag("h2", "Plan and settings"),
        pairs(
            [
                ("GPU workers", _count(plan.gpu_workers)),
                ("CPU workers", _count(plan.cpu_workers)),
                ("limited by", ", ".join(plan.limited_by) or "nothing"),
                ("presets", ", ".join(plan.presets) or "none"),
                ("needed for a worker", size(plan.needed_bytes)),
                ("no GPU because", plan.absence),
                ("platform", report.run.platform or UNKNOWN),
            ]
        ),
        tag(
            "details",
            tag("summary", plural(len(rows), "setting")),
            table("Settings", ["setting", "value", "from"], rows),
        )
        if rows
        else Markup(""),
        id="settings",
    )


def _count(workers: float | None) -> str:
    return UNKNOWN if workers is None else str(workers)


def terminal_text(report: Shown) -> Markup:
    """What the terminal said."""
    if not report.summary:
        return Markup("")
    return tag(
        "section",
        tag(
            "details",
            tag("summary", "What the terminal said"),
            tag("pre", "\n".join(report.summary)),
        ),
        id="terminal",
    )
