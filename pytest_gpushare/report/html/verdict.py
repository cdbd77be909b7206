"""The verdict at one glance: four questions, and what the document answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from pytest_gpushare.report.html.markup import (
    each,
    label,
    listed,
    number,
    percent,
    size,
    span,
    tests_peak,
    texts,
)
from pytest_gpushare.units import plural

GOOD, WARNING, BAD, NEUTRAL = "good", "warning", "bad", "neutral"

_OUTCOMES = ("failed", "error", "crashed", "passed", "skipped", "xfailed", "xpassed")
_EXITS = {2: "interrupted", 3: "ended by an internal error", 4: "ended by wrong usage"}


class Answer(NamedTuple):
    """A question, its answer in a few words, and what stands behind it."""

    question: str
    state: str
    """`good`, `warning`, `bad` or `neutral`."""
    answer: str
    details: list[str]


def title(document: Mapping[str, Any]) -> str:
    """What the browser's tab says."""
    return f"{outcome(document)[1]} · GPU share report"


def outcome(document: Mapping[str, Any]) -> tuple[str, str]:
    """How the tests ended: the state, and `2 failed, 20 passed, 1 skipped`."""
    run = document.get("run") or {}
    counts = Counter(str(test.get("outcome")) for test in each(document, "tests"))
    words = [f"{counts.pop(name)} {name}" for name in _OUTCOMES if name in counts]
    words += [f"{count} {name}" for name, count in sorted(counts.items())]
    text = ", ".join(words) or "No test ran"
    status = run.get("exit_status")
    if run.get("finished") is False:
        return BAD, f"{text}; the run did not finish"
    if status in _EXITS:
        return BAD, f"{text}; {_EXITS[status]}"
    wrong = status not in (0, 5, None) or any(
        test.get("outcome") in ("failed", "error", "crashed") for test in each(document, "tests")
    )
    return (BAD if wrong else GOOD if words else NEUTRAL), text


def answers(document: Mapping[str, Any]) -> list[Answer]:
    """The four answers, in the order of the page."""
    return [_who(document), _how_near(document), _ollama(document), _change(document)]


def _who(document: Mapping[str, Any]) -> Answer:
    question = "Who used which GPU?"
    plan, workers = document.get("plan") or {}, each(document, "workers")
    on_gpu = [worker for worker in workers if worker.get("role") == "gpu"]
    beside = len(workers) - len(on_gpu)
    also = [plural(beside, "CPU worker") + " beside"] if beside and on_gpu else []
    simulated = (document.get("run") or {}).get("simulated")
    if simulated:
        return Answer(
            question, NEUTRAL, "Nobody: simulated devices", [_workers(plan, workers), *also]
        )
    if not on_gpu:
        why = str(plan.get("absence") or "")
        return Answer(
            question,
            WARNING if beside else NEUTRAL,
            "No test was given a GPU",
            list(filter(None, [plural(beside, "CPU worker") if beside else "", why])),
        )
    lines = []
    for device in each(document, "devices"):
        own = [worker for worker in on_gpu if worker.get("device") == device.get("uuid")]
        slots = {size(worker.get("slot_bytes")) for worker in own}
        names = listed([str(worker.get("id")) for worker in own]) or "no worker"
        if len(slots) == 1:
            names += f", {slots.pop()}{' each' if len(own) > 1 else ''}"
        lines.append(f"{label(device)} {device.get('name') or ''}: {names}".replace("  ", " "))
    used = len({worker.get("device") for worker in on_gpu})
    answer = f"{plural(len(on_gpu), 'worker')} on {plural(used, 'GPU')}"
    return Answer(question, GOOD, answer, [*lines, *also])


def _workers(plan: Mapping[str, Any], workers: list[Mapping[str, Any]]) -> str:
    planned = plan.get("gpu_workers") or plan.get("cpu_workers") or len(workers)
    return f"{plural(int(planned), 'worker')}, counted for a machine that is not here"


def _how_near(document: Mapping[str, Any]) -> Answer:
    question = "How near to the limit?"
    measured = [
        device
        for device in each(document, "devices")
        if number(device.get("peak_used_bytes")) is not None and number(device.get("total_bytes"))
    ]
    short = [event for event in each(document, "events") if event.get("kind") == "oom"]
    failed = f"{plural(len(short), 'test')} ran out of memory" if short else ""
    if not measured:
        return Answer(question, BAD if short else NEUTRAL, failed or "Not measured", [])
    nearest = max(measured, key=lambda device: device["peak_used_bytes"] / device["total_bytes"])
    peak, total = nearest["peak_used_bytes"], nearest["total_bytes"]
    buffer = number(nearest.get("safety_buffer_bytes")) or 0
    state = BAD if short else WARNING if peak > total - buffer else GOOD
    several = len(measured) > 1
    where = f" of {label(nearest)}, the fullest of {len(measured)} GPUs" if several else ""
    details = [f"{size(peak)} of {size(total)} at the peak{where}"]
    if peak > total - buffer and buffer:
        details.append(f"{size(peak - (total - buffer))} into the safety buffer of {size(buffer)}")
    held, budget = number(nearest.get("peak_tests_bytes")), nearest.get("budget_bytes")
    if held is None:
        details.append(f"what tests held of their budget of {size(budget)} is unknown")
    else:
        details.append(f"tests held {tests_peak(nearest)} of their budget of {size(budget)}")
        if (number(budget) or held) < held and state == GOOD:
            state = WARNING
    answer = failed or f"{percent(peak, total)} full"
    return Answer(question, state, answer, details)


def _ollama(document: Mapping[str, Any]) -> Answer:
    question = "Did Ollama suffer?"
    ollama = document.get("ollama")
    if not ollama:
        return Answer(question, NEUTRAL, "It was not asked", [])
    lines = texts(ollama, "verdict")
    kinds = {event.get("kind") for event in each(document, "events")}
    if ollama.get("spilled_under_tests"):
        return Answer(question, BAD, "Yes, while tests ran", lines)
    if not ollama.get("answered"):
        problem = str(ollama.get("problem") or "no answer")
        where = f"{ollama.get('address') or 'its server'}: {problem}"
        return Answer(question, NEUTRAL, "Nobody can tell", [where, *lines])
    spilled = any(model.get("spilled") for model in each(ollama, "models"))
    if spilled or kinds & {"ollama-spilled", "ollama-unreachable", "ollama-reloaded"}:
        return Answer(question, WARNING, "Something happened to it", lines)
    return Answer(question, GOOD, "No", lines or _held_at_the_start(ollama))


def _held_at_the_start(ollama: Mapping[str, Any]) -> list[str]:
    names = [str(model.get("name")) for model in each(ollama, "models")]
    return [f"at the start it held {listed(names) or 'no model'}"]


def _change(document: Mapping[str, Any]) -> Answer:
    question = "What to change?"
    hints, leaks = texts(document, "hints"), each(document, "leaks")
    shortages = texts(document, "shortages")
    problems = texts(document, "problems")
    if leaks:
        left = sum(number(leak.get("bytes")) or 0 for leak in leaks)
        hints.append(f"{plural(len(leaks), 'test')} left {size(left)} behind: see the leaks below")
    lines = [*shortages, *problems, *hints]
    if shortages and not hints:
        return Answer(question, WARNING, "No setting would have helped", lines)
    if not lines:
        return Answer(question, GOOD, "Nothing", ["no better setting was found"])
    state = WARNING if leaks or problems or shortages else NEUTRAL
    return Answer(question, state, plural(len(hints) + len(problems), "suggestion"), lines)


def subtitle(document: Mapping[str, Any]) -> str:
    """When and how long, on what."""
    run = document.get("run") or {}
    parts = [
        str(run.get("started") or "")[:16].replace("T", " "),
        f"took {span(run.get('duration_s'))}" if number(run.get("duration_s")) else "",
        *(f"{name} {run[name]}" for name in ("pytest", "xdist") if run.get(name)),
        f"Python {run['python']}" if run.get("python") else "",
        f"driver {run['driver']}" if run.get("driver") else "",
    ]
    return " · ".join(filter(None, parts))
