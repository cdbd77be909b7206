"""The verdict at one glance: four questions, and what the document answers."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from pytest_gpushare.report.html.markup import listed, peak_text, percent, size, span, tests_peak
from pytest_gpushare.report.html.shown import Shown, ShownModel, ShownPlan
from pytest_gpushare.units import plural

GOOD, WARNING, BAD, NEUTRAL = "good", "warning", "bad", "neutral"

_OUTCOMES = ("failed", "error", "crashed", "passed", "skipped", "xfailed", "xpassed")
_EXITS = {2: "interrupted", 3: "ended by an internal error", 4: "ended by wrong usage"}

_KEPT = re.compile(r"gpu_share_\w+ = [^;]* would have kept [^;]*")
"""What the verdict on a model says to change."""


class Answer(NamedTuple):
    """A question, its answer in a few words, and what stands behind it."""

    question: str
    state: str
    """`good`, `warning`, `bad` or `neutral`."""
    answer: str
    details: list[str]


def title(report: Shown) -> str:
    """What the browser's tab says."""
    return f"{outcome(report)[1]} · GPU share report"


def outcome(report: Shown) -> tuple[str, str]:
    """How the tests ended: the state, and `2 failed, 20 passed, 1 skipped`."""
    counts = Counter(str(test.outcome) for test in report.tests)
    words = [f"{counts.pop(name)} {name}" for name in _OUTCOMES if name in counts]
    words += [f"{count} {name}" for name, count in sorted(counts.items())]
    text = ", ".join(words) or "No test ran"
    status = report.run.exit_status
    if report.run.finished is False:
        return BAD, f"{text}; the run did not finish"
    if status in _EXITS:
        return BAD, f"{text}; {_EXITS[int(status)]}"
    wrong = status not in (0, 5, None) or any(
        test.outcome in ("failed", "error", "crashed") for test in report.tests
    )
    return (BAD if wrong else GOOD if words else NEUTRAL), text


def answers(report: Shown) -> list[Answer]:
    """The four answers, in the order of the page."""
    return [_who(report), _how_near(report), _ollama(report), _change(report)]


def _who(report: Shown) -> Answer:
    question = "Who used which GPU?"
    on_gpu = [worker for worker in report.workers if worker.role == "gpu"]
    cpu = len(report.workers) - len(on_gpu)
    also = ["and " + plural(cpu, "CPU worker")] if cpu and on_gpu else []
    if report.run.simulated:
        workers = _workers(report.plan, len(report.workers))
        return Answer(question, NEUTRAL, "Nobody: simulated devices", [workers, *also])
    if not on_gpu:
        details = [plural(cpu, "CPU worker") if cpu else "", report.plan.absence]
        state = WARNING if cpu else NEUTRAL
        return Answer(question, state, "No test was given a GPU", list(filter(None, details)))
    lines = []
    for device in report.devices:
        here = [worker for worker in on_gpu if worker.device == device.uuid]
        slots = {size(worker.slot_bytes) for worker in here}
        names = listed([worker.id for worker in here]) or "no worker"
        if len(slots) == 1:
            names += f", {slots.pop()}{' each' if len(here) > 1 else ''}"
        lines.append(f"{device.label} {device.name}: {names}".replace("  ", " "))
    used = len({worker.device for worker in on_gpu})
    answer = f"{plural(len(on_gpu), 'worker')} on {plural(used, 'GPU')}"
    return Answer(question, GOOD, answer, [*lines, *also])


def _workers(plan: ShownPlan, started: int) -> str:
    planned = plan.gpu_workers or plan.cpu_workers or started
    return f"{plural(int(planned), 'worker')}, counted for a machine that is not here"


def _how_near(report: Shown) -> Answer:
    question = "How near to the limit?"
    measured = [
        (device, device.peak_used_bytes, device.total_bytes)
        for device in report.devices
        if device.peak_used_bytes is not None and device.total_bytes
    ]
    short = [event for event in report.events if event.kind == "oom"]
    failed = f"{plural(len(short), 'test')} ran out of memory" if short else ""
    if not measured:
        return Answer(question, BAD if short else NEUTRAL, failed or "Not measured", [])
    nearest, peak, total = max(measured, key=lambda entry: entry[1] / entry[2])
    buffer = nearest.safety_buffer_bytes or 0
    state = BAD if short else WARNING if peak > total - buffer else GOOD
    several = len(measured) > 1
    where = f" of {nearest.label}, the fullest of {len(measured)} GPUs" if several else ""
    most = peak_text(peak, nearest.peak_used_exact)
    details = [f"{most} of {size(total)} at the peak{where}"]
    if peak > total - buffer and buffer:
        details.append(f"{size(peak - (total - buffer))} into the safety buffer of {size(buffer)}")
    held, budget = nearest.peak_tests_bytes, nearest.budget_bytes
    if held is None:
        details.append(f"what tests held of their budget of {size(budget)} is unknown")
    else:
        details.append(f"tests held {tests_peak(nearest)} of their budget of {size(budget)}")
        if (budget or held) < held and state == GOOD:
            state = WARNING
    answer = failed or f"{percent(peak, total)} full"
    return Answer(question, state, answer, details)


def _ollama(report: Shown) -> Answer:
    question = "Did Ollama suffer?"
    ollama = report.ollama
    if ollama is None:
        return Answer(question, NEUTRAL, "It was not asked", [])
    lines = ollama.verdict
    kinds = {event.kind for event in report.events}
    if ollama.spilled_under_tests:
        return Answer(question, BAD, "Yes, while tests ran", lines)
    if not ollama.answered:
        where = f"{ollama.address or 'its server'}: {ollama.problem or 'no answer'}"
        return Answer(question, NEUTRAL, "Unknown", [where, *lines])
    spilled = any(model.spilled for model in report.models)
    if spilled or kinds & {"ollama-spilled", "ollama-unreachable", "ollama-reloaded"}:
        return Answer(question, WARNING, "Something happened to it", lines)
    return Answer(question, GOOD, "No", lines or _held_at_the_start(report.models))


def _held_at_the_start(models: list[ShownModel]) -> list[str]:
    return [f"at the start it held {listed([model.name for model in models]) or 'no model'}"]


def _change(report: Shown) -> Answer:
    question = "What to change?"
    hints, leaks = list(report.hints), report.leaks
    if leaks:
        left = sum(leak.bytes or 0 for leak in leaks)
        hints.append(f"{plural(len(leaks), 'test')} left {size(left)} behind: see the leaks below")
    verdict = report.ollama.verdict if report.ollama is not None else []
    hints += [found for line in verdict for found in _KEPT.findall(line)]
    lines = [*report.shortages, *report.problems, *hints]
    if report.shortages and not hints:
        return Answer(question, WARNING, "No setting would have helped", lines)
    if not lines:
        return Answer(question, GOOD, "Nothing", ["no better setting was found"])
    state = WARNING if leaks or report.problems or report.shortages else NEUTRAL
    count = len(hints) + len(report.problems)
    return Answer(question, state, plural(count, "suggestion"), lines)


def subtitle(report: Shown) -> str:
    """When and how long, on what."""
    run = report.run
    parts = [
        run.started[:16].replace("T", " "),
        f"took {span(run.duration_s)}" if run.duration_s else "",
        f"pytest {run.pytest}" if run.pytest else "",
        f"xdist {run.xdist}" if run.xdist else "",
        f"Python {run.python}" if run.python else "",
        f"driver {run.driver}" if run.driver else "",
    ]
    return " · ".join(filter(None, parts))
