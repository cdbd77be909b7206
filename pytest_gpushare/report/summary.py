"""What is said of a run when its tests are over: in the terminal, and on GitHub's job page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pytest_gpushare.planning.plan import shortage
from pytest_gpushare.report.advice import (
    admits_by_needs,
    amount,
    declared_too_small,
    gpu_tests_without_gpu,
)
from pytest_gpushare.report.header import header
from pytest_gpushare.report.ollama_lines import as_error, lines_of_tests, verdict
from pytest_gpushare.report.output import Line, OutputOptions
from pytest_gpushare.report.results import Results, Usage
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.session.tests import Leak
from pytest_gpushare.session.workers import WorkerRecord
from pytest_gpushare.text import printable, sparkline
from pytest_gpushare.units import MB, at_least, format_gb, plural

if TYPE_CHECKING:
    from pytest_gpushare.events import Event


def summary(results: Results, view: OutputOptions) -> list[Line]:
    """The lines after the tests: problems that showed while they ran, what they used, and what to
    change; at -q one line where anything needs attention."""
    run = results.run
    lines = [
        *_overwritten(run),
        *_lost_hosts(run),
        *_verdict(run),
        *_routing(run),
        *_out_of_memory(run),
        *_needs_exceeded(results),
        *_needs_changed(run),
        *(Line(f"gpu-share: {text}", problem=True) for text in run.unwritten),
        *lines_of_tests(run, view),
        *_usage_lines(results, view),
        *_hints(results),
    ]
    return lines if view.verbosity >= 0 else _attention(run, lines)


WORTH_TELLING = 64 * MB
"""Bytes by which a device fills without anybody's tests: desktops do that all the time."""

_MOST_LEAKS = 3
_NARROWEST, _USUAL, _WIDEST = 8, 14, 40
_SPARE = 4
"""Columns for a blank, and for figures of other devices that are longer."""
_MOST_NAMES = 3


def _routing(run: ActiveRun) -> Iterator[Line]:
    """Tests that ran on other workers than their markers say, and tests skipped because of that."""
    parity, marker = run.differences, run.settings.marker
    if parity is None:
        return
    lost = parity.lost()
    if lost:
        names = [f"{skip.nodeid} ({skip.reason[:80]})" for skip in lost[:_MOST_NAMES]]
        more = f", and {len(lost) - len(names)} more" if len(lost) > len(names) else ""
        yield Line(
            "gpu-share: skipped on CPU workers for lack of a GPU: "
            f"{plural(len(lost), 'test')}; mark with {marker} what needs one: "
            f"{', '.join(names)}{more}{as_error(run)}",
            problem=True,
            mark=_mark(run),
        )
    if parity.by_skip:
        yield Line(
            "gpu-share: run on GPU workers, since markers skip it without a GPU: "
            f"{plural(len(parity.by_skip), 'test')}; mark with {marker} what needs one"
        )
    if parity.only_on_gpu or parity.only_on_cpu:
        yield Line(
            f"gpu-share: workers collected different tests: {parity.only_on_gpu} only GPU workers, "
            f"{parity.only_on_cpu} only CPU workers; each test ran where it was collected",
        )
    if parity.has_cpu_workers and parity.tests and not (parity.gpu_tests or parity.uses_models):
        yield Line(
            "gpu-share: no GPU test was selected: none of "
            f"{plural(parity.tests, 'selected test')} is marked with {marker}"
        )


MOST = 10
"""Tests that are listed one by one."""


def _out_of_memory(run: ActiveRun) -> Iterator[Line]:
    """Each test that ran out of memory: who held VRAM then, and how it went alone."""
    again = {event.facts["nodeid"]: event for event in run.record.events("oom-retried")}
    found = run.record.events("oom")
    texts = [_sentence(event, again.get(event.facts["nodeid"])) for event in found]
    yield from _first(texts, "ran out of VRAM: see their reports", problem=True)


def _sentence(event: Event, again: Event | None) -> str:
    if again is None:
        return event.text
    alone = "passed alone" if again.facts["outcome"] == "passed" else "failed alone"
    return f"{event.text}; {alone}"


def _needs_exceeded(results: Results) -> Iterator[Line]:
    """Tests that took more than they were admitted with, which their neighbours then lack."""
    named = {each.nodeid for each in results.over_need}
    others = _latest(results.run, "need-exceeded")
    texts = [advice.text for advice in declared_too_small(results.run, results.over_need)]
    texts += [
        f"{text}: raise it, or let it be learned"
        for nodeid, text in others.items()
        if nodeid not in named
    ]
    yield from _first(texts, "took more VRAM than their needs", problem=True)


def _needs_changed(run: ActiveRun) -> Iterator[Line]:
    """Tests that took another amount than the one by which they are packed."""
    # Elsewhere nothing is admitted by what was learned, and nobody has to know.
    if "packed" in run.settings.presets:
        texts = [f"{text}: learned again" for text in _latest(run, "need-changed").values()]
        yield from _first(texts, "took other VRAM than when they last ran", problem=False)


def _latest(run: ActiveRun, kind: str) -> dict[str, str]:
    """Node id -> the last event of this kind, in words."""
    return {event.facts["nodeid"]: event.text for event in run.record.events(kind)}


def _first(texts: Sequence[str], others: str, *, problem: bool) -> Iterator[Line]:
    """A line for each of the first few, and one with the number of the others."""
    for text in texts[:MOST]:
        yield Line(f"gpu-share: {text}", problem=problem)
    if len(texts) > MOST:
        more = plural(len(texts) - MOST, "test")
        yield Line(f"gpu-share: {more} more {others}", problem=problem)


def _overwritten(run: ActiveRun) -> Iterator[Line]:
    for worker, how in sorted(run.overwritten.items()):
        text = f"{worker} does not see the GPU that it was given: {how}{as_error(run)}"
        yield Line(f"gpu-share: {text}", problem=True, mark=_mark(run))


def _mark(run: ActiveRun) -> str:
    """Red where a problem of this kind fails the run."""
    return "red" if run.strict else ""


def _verdict(run: ActiveRun) -> Iterator[Line]:
    for text in run.not_kept():
        yield Line(f"gpu-share: {text}")
    for host, monitor in run.monitors():
        where = f"{host}: " if host else ""
        if monitor.problem:
            text = f"{where}the monitor of Ollama's VRAM has failed: {monitor.problem}"
            yield Line(f"gpu-share: {text}", problem=True)
        for sentence in verdict(monitor.server) if monitor.server is not None else ():
            kind = as_error(run) if sentence.is_ours else ""
            yield Line(
                f"gpu-share: {where}{sentence.text}{kind}", sentence.is_problem, sentence.mark
            )
            for detail in sentence.details:
                yield Line(f"  {detail}", sentence.is_problem, sentence.mark)


def _lost_hosts(run: ActiveRun) -> Iterator[Line]:
    """A line for each host that was lost during the run."""
    for host in run.hosts:
        if host.lost:
            workers = plural(host.plan.workers, "worker")
            yield Line(
                f"gpu-share: host {host.label} was lost: {host.lost}: its {workers} were not "
                "replaced",
                problem=True,
            )


def _usage_lines(results: Results, view: OutputOptions) -> Iterator[Line]:
    """Devices and leaks; from -v also workers and the highest peaks."""
    members = [member for member in results.workers if member.role == "gpu"]
    peaks = [member for member in members if results.held[member.id] is not None]
    devices = [use for use in results.usages if use.grown > WORTH_TELLING]
    for use in devices:
        yield _device(use, view, any(m.device == use.plan.device.uuid for m in peaks))
    if view.verbosity >= 1 and (devices or peaks):
        for member in members:
            yield _worker(member, results)
        for nodeid, peak in results.highest_peaks:
            yield Line(f"  VRAM {amount(peak)}: {printable(nodeid)}")
    yield from _leaks(results.leaks, view)


def _device(use: Usage, view: OutputOptions, counted: bool) -> Line:
    plan = use.plan
    peaks = use.peaks
    least = at_least(peaks.is_used_exact)
    used = _part(use.peak_used, plan.device.total)
    text = f"gpu-share: {plan.device.label} VRAM peak {least}{used}"
    if use.is_attributed:
        text += f", tests {at_least(peaks.is_rise_exact)}{_part(peaks.rise, plan.reach)}"
        if peaks.is_unattributed:
            text += f" ({format_gb(peaks.unattributed)} unattributed)"
    elif not counted and plan.workers:
        text += f" (up {least}{format_gb(use.grown)}, by which process is unknown)"
    over = use.is_attributed and plan.reach < peaks.rise
    room = view.columns - len(text) - _SPARE
    # Where the line has no room for it, it stands on the next one.
    heights = use.watched.series.heights(min(room, _WIDEST) if room >= _NARROWEST else _USUAL)
    text += f" {sparkline(height / max(1, plan.device.total) for height in heights)}"
    return Line(text, problem=over)


def _worker(member: WorkerRecord, results: Results) -> Line:
    run = results.run
    label = next(
        plan.device.label for plan in run.plan.devices if plan.device.uuid == member.device
    )
    crashed = ", crashed" if member.crashed else ""
    peak = results.held[member.id]
    if peak is None:
        return Line(f"  {member.id} on {label}: VRAM peak unknown{crashed}")
    least = at_least(peak.exact)
    if admits_by_needs(run):
        # A need may be more than a slot.
        return Line(f"  {member.id} on {label}: VRAM peak {least}{format_gb(peak.size)}{crashed}")
    return Line(
        f"  {member.id} on {label}: VRAM peak {least}{_part(peak.size, member.slot)}{crashed}",
        problem=peak.size > member.slot,
    )


def _leaks(found: Sequence[Leak], view: OutputOptions) -> Iterator[Line]:
    most = len(found) if view.verbosity >= 1 else _MOST_LEAKS
    for leak in found[:most]:
        yield Line(f"gpu-share: {leak_text(leak)}", problem=True)
    if len(found) > most:
        rest = found[most:]
        size = format_gb(sum(leak.size for leak in rest))
        who = plural(len(rest), "more leak")
        yield Line(f"gpu-share: {who} of VRAM, {size} in all (-v lists them)", problem=True)


def leak_text(leak: Leak) -> str:
    """Which test left how much, or among which tests it is."""
    size, first = format_gb(leak.size), printable(leak.suspects[0])
    if leak.among == 1:
        return f"{first} left {size} of VRAM behind ({leak.worker})"
    return f"{leak.worker} kept {size} of VRAM, left by one of {leak.among} tests from {first} on"


def _part(size: int, of: int) -> str:
    """`7.2 of 9.0 GB`."""
    return f"{format_gb(size).removesuffix(' GB')} of {format_gb(of)}"


HINT = "gpu-share: hint:"
"""How a line begins that says what to change."""


def _hints(results: Results) -> Iterator[Line]:
    """What to change; at the very end what GPU tests lacked, with the best of it."""
    run, advice = results.run, list(results.assessment.advice)
    lacking = gpu_tests_without_gpu(run)
    best = advice.pop(0) if lacking is not None and advice else None
    for each in advice:
        yield Line(f"{HINT} {each.text}")
    if lacking is not None:
        # Whoever has set them to be skipped without a GPU knows that.
        is_problem = bool(lacking.failed) or not run.plan.absence
        change = f": {best.change}" if best is not None else ""
        yield Line(f"gpu-share: {lacking.text}{change}", is_problem)


def _attention(run: ActiveRun, lines: Sequence[Line]) -> list[Line]:
    """One line: the gravest problem of the run, its header included, and how many more."""
    # What is indented belongs to the line above.
    found = [line for line in lines if line.problem and not line.text.startswith(" ")]
    found = [*sorted(found, key=lambda line: line.mark != "red"), *header(run, -1)]
    if len(found) < 2:
        return found
    more = plural(len(found) - 1, "more problem")
    return [found[0]._replace(text=f"{found[0].text} (and {more}: run without -q)")]


_MOST_ANNOTATIONS = 10
"""GitHub shows ten of a kind for each step."""
_LONGEST = 300
_HARMLESS = frozenset(" .,:/%()=")


def step_summary(results: Results, lines: Sequence[Line]) -> str:
    """Markdown: the devices, hosts, highest peaks, what became of Ollama's models, and every
    problem; text is escaped."""
    run = results.run
    parts = ["### gpu-share", "", *_table(results)]
    if run.hosts:
        parts += ["", "| host | GPU workers | CPU workers | tests | |", "|---|---|---|---|---|"]
        parts += [f"| {' | '.join(map(escaped, row))} |" for row in _host_rows(run)]
    if results.highest_peaks:
        parts += ["", "| test | VRAM |", "|---|---|"]
        parts += [f"| {escaped(name)} | {amount(peak)} |" for name, peak in results.highest_peaks]
    notable = [
        line.text.strip()
        for line in lines
        if line.problem or line.mark or line.text.startswith(HINT)
    ]
    if notable:
        parts += ["", *(f"- {escaped(text)}" for text in notable)]
    return "\n".join([*parts, "", ""])


def workflow_commands(results: Results) -> Iterator[str]:
    """The workflow commands for spills and leaks; errors where they fail the run."""
    run = results.run
    spills = [event.text for event in run.record.events("ollama-spilled")]
    kind = "error" if spills and run.has_failed() else "warning"
    for text in spills[:_MOST_ANNOTATIONS]:
        yield f"::{kind} title={_property('gpu-share: Ollama')}::{_data(text)}"
    for leak in results.leaks[:_MOST_ANNOTATIONS]:
        name = leak.suspects[0] if leak.among == 1 else ""
        file = name.partition("::")[0]
        place = f"file={_property(file)}," if file else ""
        title = _property("gpu-share: VRAM left behind")
        yield f"::warning {place}title={title}::{_data(leak_text(leak))}"


def escaped(text: str) -> str:
    """A text that Markdown and HTML take as it is: every sign that means something is a number."""
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return "".join(
        c if c.isalnum() or c in _HARMLESS else f"&#{ord(c)};" if c.isprintable() else " "
        for c in text
    )


def _table(results: Results) -> Iterator[str]:
    """The devices, in the words of the page."""
    # Only a job of GitHub's needs it.
    from pytest_gpushare.report.document import devices
    from pytest_gpushare.report.html.markup import peak_text, size, tests_peak

    yield "| device | VRAM peak | of | tests, peak | usable for tests | GPU workers |"
    yield "|---|---|---|---|---|---|"
    plan = results.run.plan
    for planned, device in zip(plan.devices, devices(results), strict=True):
        cells = [
            f"{planned.device.label} {device['name']}",
            peak_text(device["peak_used_bytes"], device["peak_used_exact"]),
            size(device["total_bytes"]),
            tests_peak(device),
            size(device["budget_bytes"]),
            str(device["workers"]),
        ]
        yield f"| {' | '.join(escaped(cell) for cell in cells)} |"
    if not plan.devices:
        yield f"| {escaped(plan.absence or 'no GPU')} | | | | | |"


def _host_rows(run: ActiveRun) -> Iterator[list[str]]:
    """For each host: its name, GPU and CPU workers, tests that ran there, and what went wrong."""
    tests = Counter(run.host_named(test.worker) for test in run.tests)
    for host in run.hosts:
        missing = "" if host.plan.slots else shortage(host.plan)
        yield [
            host.label,
            str(len(host.plan.slots)),
            str(host.plan.cpu_workers),
            str(tests[host.name or None]),
            f"lost: {host.lost}" if host.lost else missing,
        ]


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
