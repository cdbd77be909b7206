"""The sections of the page: the verdict at one glance, then lists and tables of facts."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from pytest_gpushare.report.html.data import MOST_EVENTS, colours
from pytest_gpushare.report.html.markup import (
    UNKNOWN,
    Markup,
    Part,
    Record,
    breakable,
    clock,
    label,
    lasted,
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
    tests_peak,
)
from pytest_gpushare.units import plural

GOOD, WARNING, BAD, NEUTRAL = "good", "warning", "bad", "neutral"

_OUTCOMES = ("failed", "error", "crashed", "passed", "skipped", "xfailed", "xpassed")

_KEPT = re.compile(r"gpu_share_\w+ = [^;]* would have kept [^;]*")
"""What the verdict on a model says to change."""


class Answer(NamedTuple):
    """A question, its answer in a few words, and what stands behind it."""

    question: str
    state: str
    """`good`, `warning`, `bad` or `neutral`."""
    answer: str
    details: list[str]


def title(report: Record) -> str:
    """What the browser's tab says."""
    return f"{outcome(report)[1]} · GPU share report"


def outcome(report: Record) -> tuple[str, str]:
    """How the tests ended: the state, and `2 failed, 20 passed, 1 skipped`."""
    counts = Counter(test["outcome"] for test in report["tests"])
    words = [f"{counts[name]} {name}" for name in _OUTCOMES if name in counts]
    text = ", ".join(words) or "No test ran"
    if not report["run"]["finished"]:
        return BAD, f"{text}; the run did not finish"
    wrong = report["run"]["exit_status"] not in (0, 5) or any(
        map(counts.get, ("failed", "error", "crashed"))
    )
    return (BAD if wrong else GOOD if words else NEUTRAL), text


def answers(report: Record) -> list[Answer]:
    """The four answers, in the order of the page."""
    return [_who(report), _how_near(report), _ollama(report), _change(report)]


def _who(report: Record) -> Answer:
    question = "Who used which GPU?"
    on_gpu = [worker for worker in report["workers"] if worker["role"] == "gpu"]
    cpu = len(report["workers"]) - len(on_gpu)
    also = ["and " + plural(cpu, "CPU worker")] if cpu and on_gpu else []
    if report["run"]["simulated"]:
        plan = report["plan"]
        planned = plan["gpu_workers"] or plan["cpu_workers"] or len(report["workers"])
        workers = f"{plural(planned, 'worker')}, counted for a machine that is not here"
        return Answer(question, NEUTRAL, "Nobody: simulated devices", [workers, *also])
    if not on_gpu:
        details = [plural(cpu, "CPU worker") if cpu else "", report["plan"]["absence"]]
        state = WARNING if cpu else NEUTRAL
        return Answer(question, state, "No test was given a GPU", list(filter(None, details)))
    lines = []
    for device in report["devices"]:
        here = [worker for worker in on_gpu if worker["device"] == device["uuid"]]
        slots = {size(worker["slot_bytes"]) for worker in here}
        names = listed([worker["id"] for worker in here]) or "no worker"
        if len(slots) == 1:
            names += f", {slots.pop()}{' each' if len(here) > 1 else ''}"
        lines.append(f"{label(device)} {device['name']}: {names}".replace("  ", " "))
    used = len({worker["device"] for worker in on_gpu})
    answer = f"{plural(len(on_gpu), 'worker')} on {plural(used, 'GPU')}"
    return Answer(question, GOOD, answer, [*lines, *also])


def _how_near(report: Record) -> Answer:
    question = "How near to the limit?"
    measured = [
        (device, device["peak_used_bytes"], device["total_bytes"])
        for device in report["devices"]
        if device["peak_used_bytes"] is not None and device["total_bytes"]
    ]
    short = [event for event in report["events"] if event["kind"] == "oom"]
    failed = f"{plural(len(short), 'test')} ran out of memory" if short else ""
    if not measured:
        return Answer(question, BAD if short else NEUTRAL, failed or "Not measured", [])
    nearest, peak, total = max(measured, key=lambda entry: entry[1] / entry[2])
    buffer = nearest["safety_buffer_bytes"]
    state = BAD if short else WARNING if peak > total - buffer else GOOD
    several = len(measured) > 1
    where = f" of {label(nearest)}, the fullest of {len(measured)} GPUs" if several else ""
    most = peak_text(peak, nearest["peak_used_exact"])
    details = [f"{most} of {size(total)} at the peak{where}"]
    if peak > total - buffer and buffer:
        details.append(f"{size(peak - (total - buffer))} into the safety buffer of {size(buffer)}")
    held, budget = nearest["peak_tests_bytes"], nearest["budget_bytes"]
    if held is None:
        details.append(f"what tests held of their budget of {size(budget)} is unknown")
    else:
        details.append(f"tests held {tests_peak(nearest)} of their budget of {size(budget)}")
        if (budget or held) < held and state == GOOD:
            state = WARNING
    answer = failed or f"{percent(peak, total)} full"
    return Answer(question, state, answer, details)


def _ollama(report: Record) -> Answer:
    question = "Did Ollama suffer?"
    ollama = report["ollama"]
    if ollama is None:
        return Answer(question, NEUTRAL, "It was not asked", [])
    lines = ollama["verdict"]
    kinds = {event["kind"] for event in report["events"]}
    if ollama["spilled_under_tests"]:
        return Answer(question, BAD, "Yes, while tests ran", lines)
    if not ollama["answered"]:
        where = f"{ollama['address']}: {ollama['problem'] or 'no answer'}"
        return Answer(question, NEUTRAL, "Unknown", [where, *lines])
    spilled = any(model["spilled"] for model in ollama["models"])
    if spilled or kinds & {"ollama-spilled", "ollama-unreachable", "ollama-reloaded"}:
        return Answer(question, WARNING, "Something happened to it", lines)
    held = listed([model["name"] for model in ollama["models"]]) or "no model"
    return Answer(question, GOOD, "No", lines or [f"at the start it held {held}"])


def _change(report: Record) -> Answer:
    question = "What to change?"
    hints, leaks = list(report["hints"]), report["leaks"]
    if leaks:
        left = sum(leak["bytes"] for leak in leaks)
        hints.append(f"{plural(len(leaks), 'test')} left {size(left)} behind: see the leaks below")
    verdict = [] if report["ollama"] is None else report["ollama"]["verdict"]
    hints += [found for line in verdict for found in _KEPT.findall(line)]
    shortages, problems = report["shortages"], report["problems"]
    lines = [*shortages, *problems, *hints]
    if shortages and not hints:
        return Answer(question, WARNING, "No setting would have helped", lines)
    if not lines:
        return Answer(question, GOOD, "Nothing", ["no better setting was found"])
    state = WARNING if leaks or problems or shortages else NEUTRAL
    return Answer(question, state, plural(len(hints) + len(problems), "suggestion"), lines)


def subtitle(report: Record) -> str:
    """When and how long, on what."""
    run = report["run"]
    parts = [run["started"][:16].replace("T", " ")]
    parts += [f"took {span(run['duration_s'])}"] if run["duration_s"] else []
    names = {"pytest": "pytest", "xdist": "xdist", "Python": "python", "driver": "driver"}
    parts += [f"{name} {run[key]}" for name, key in names.items() if run[key]]
    return " · ".join(parts)


_SIGNS = {"bad": "▼", "warning": "◆", "neutral": "●"}


def events(report: Record) -> Markup:
    """What happened, with its times; the numbers are those on the timeline."""
    happened = report["events"]
    if not happened:
        return Markup("")
    rows = []
    for event in happened[:MOST_EVENTS]:
        state, at = severity(event["kind"]), event["at_s"]
        rows.append(
            tag(
                "li",
                tag("button", clock(at), type="button", data_at=at, title="Show on the timeline"),
                tag("span", _SIGNS[state], cls="sign", aria_hidden="true"),
                tag("span", event["text"] or event["kind"], cls="text"),
                tag("code", event["kind"]),
                cls=state,
            )
        )
    left = len(happened) - MOST_EVENTS
    more = [tag("p", f"{left} more are in the JSON report.")] if left > 0 else []
    count = tag("span", f"{len(happened):,}", cls="count")
    return tag(
        "section", tag("h2", "What happened", " ", count), tag("ol", *rows), *more, id="events"
    )


def leaks(report: Record) -> Markup:
    """Tests that left VRAM behind, the largest first."""
    found = sorted(report["leaks"], key=lambda leak: -leak["bytes"])
    if not found:
        return Markup("")
    rows = [
        [
            tag("bdi", _leaky(leak)),
            leak["worker"],
            tag("b", size(leak["bytes"])),
            leak["source"],
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


def _leaky(leak: Record) -> str:
    """The test, or those of which one it was."""
    if leak["nodeid"] is not None:
        return str(leak["nodeid"])
    names = leak["suspects"][:5]
    more = leak["suspects_count"] - len(names)
    return f"one of {listed([*names, *([f'{more} more'] if more > 0 else [])])}"


def hosts(report: Record) -> Markup:
    """Each host of a run on several: its workers, their tests, and what went wrong there."""
    if not report.get("hosts"):
        return Markup("")
    ran = Counter(test.get("host") for test in report["tests"])
    rows = [
        [
            tag("bdi", host["name"] or "this host"),
            str(host["gpu_workers"]),
            str(host["cpu_workers"]),
            f"{ran[host['name']]:,}",
            host["python"] or report["run"]["python"],
            tag("b", "lost: ", host["lost"]) if host["lost"] else host["shortage"],
        ]
        for host in report["hosts"]
    ]
    heads = ["host", "GPU workers", "CPU workers", "tests", "Python", "problem"]
    return tag("section", tag("h2", "Hosts"), table("Hosts", heads, rows), id="hosts")


def workers(report: Record) -> Markup:
    """Each worker: where it ran, and its peak against its slot."""
    found = report["workers"]
    if not found:
        return Markup("")
    names = {device["uuid"]: label(device) for device in report["devices"]}
    rows: list[list[str]] = []
    for worker, colour in zip(found, colours(found), strict=True):
        kind = "cpu" if colour is None else f"worker-{colour}"
        slot, peak, device = worker["slot_bytes"], worker["peak_bytes"], worker["device"]
        allowed = max(slot, worker["need_bytes"] or 0)
        lived = span(lasted(worker["started_s"], worker["ended_s"]))
        share: list[str] = []
        if allowed and peak is not None:
            share = [meter([Part(kind, "peak", peak)], allowed), percent(peak, allowed)]
        rows.append(
            [
                tag("span", tag("i", cls=f"swatch {kind}"), worker["id"]),
                names.get(device or "", device or "CPU"),
                size(slot) if slot else "–",
                tag("b", peak_text(peak, worker["peak_exact"]), data_bytes=peak) if slot else "–",
                tag("span", *share),
                worker["peak_source"] or (UNKNOWN if slot else "–"),
                "crashed" if worker["crashed"] else lived,
            ]
        )
    heads = ["worker", "where", "slot", "peak", "peak of slot or need", "measured by", "ran"]
    return tag("section", tag("h2", "Workers"), table("Workers", heads, rows), id="workers")


def ollama(report: Record) -> Markup:
    """What Ollama said of itself and of its models."""
    found = report["ollama"]
    if found is None:
        return Markup("")
    rows = [
        [
            tag("bdi", model["name"]),
            size(model["size_bytes"]),
            size(model["size_vram_bytes"]),
            "a part on the CPU" if model["spilled"] else "whole on the GPU",
        ]
        for model in found["models"]
    ]
    return tag(
        "section",
        tag("h2", "Ollama"),
        *(tag("p", line) for line in found["verdict"]),
        table("Models", ["model", "size", "on the GPU", "at the end"], rows)
        if rows
        else Markup(""),
        pairs(
            [
                ("server", found["address"]),
                ("version", found["version"] or UNKNOWN),
                ("found by", found["found_by"]),
                ("problem", found["problem"]),
            ]
        ),
        id="ollama",
    )


def settings(report: Record) -> Markup:
    """The plan, and each setting with its origin; those that are not defaults first."""
    plan = report["plan"]
    rows = [
        [
            tag("code", *breakable(f"gpu_share_{key}")),
            setting["value"],
            setting["origin"],
        ]
        for key, setting in sorted(
            plan["settings"].items(), key=lambda item: (item[1]["origin"] == "default", item[0])
        )
    ]
    return tag(
        "section",
        tag("h2", "Plan and settings"),
        pairs(
            [
                ("GPU workers", str(plan["gpu_workers"])),
                ("CPU workers", str(plan["cpu_workers"])),
                ("limited by", ", ".join(plan["limited_by"]) or "nothing"),
                ("presets", ", ".join(plan["presets"]) or "none"),
                ("needed for a worker", size(plan["needed_bytes"])),
                ("no GPU because", plan["absence"]),
                ("platform", report["run"]["platform"]),
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


def terminal_text(report: Record) -> Markup:
    """What the terminal said."""
    if not report["summary"]:
        return Markup("")
    return tag(
        "section",
        tag(
            "details",
            tag("summary", "What the terminal said"),
            tag("pre", "\n".join(report["summary"])),
        ),
        id="terminal",
    )
