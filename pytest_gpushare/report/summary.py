"""The lines after the tests: what went wrong on the way, and what became of Ollama's models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.ollama.history import Life
from pytest_gpushare.ollama.models import LoadedModel, described
from pytest_gpushare.ollama.monitor import MonitoredServer
from pytest_gpushare.ollama.spill import Cause, has_room, held_by, uses_no_gpu, why, why_in_ram
from pytest_gpushare.report.advice import (
    assess,
    declared_too_small,
    gpu_tests_without_gpu,
    over_need,
)
from pytest_gpushare.report.by_host import lost_hosts
from pytest_gpushare.report.header import Line, OutputOptions, header
from pytest_gpushare.report.results import usage_lines
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.units import format_gb, plural

if TYPE_CHECKING:
    from pytest_gpushare.events import Event
    from pytest_gpushare.ollama.spill import Spill


_MOST_NAMES = 3


def routing(run: ActiveRun) -> Iterator[Line]:
    """Tests that ran on other workers than their markers say, and tests skipped because of that."""
    parity, marker = run.routing.differences, run.settings.marker
    if parity is None:
        return
    lost = parity.lost
    if lost:
        names = [f"{skip.nodeid} ({skip.reason[:80]})" for skip in lost[:_MOST_NAMES]]
        more = f", and {len(lost) - len(names)} more" if len(lost) > len(names) else ""
        kind = " (an error under --gpu-share-strict)" if run.strict else ""
        yield Line(
            "gpu-share: skipped on CPU workers for lack of a GPU: "
            f"{plural(len(lost), 'test')}; mark with {marker} what needs one: "
            f"{', '.join(names)}{more}{kind}",
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


def out_of_memory(run: ActiveRun) -> Iterator[Line]:
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


def needs_exceeded(run: ActiveRun) -> Iterator[Line]:
    """Tests that took more than they were admitted with, which their neighbours then lack."""
    declared = list(declared_too_small(run))
    named = {test.nodeid for test, _ in over_need(run)}
    others = {
        event.facts["nodeid"]: event.text
        for event in run.record.events("need-exceeded")
        if event.facts["nodeid"] not in named
    }
    texts = [advice.text for advice in declared]
    texts += [f"{text}: raise it, or let it be learned" for text in others.values()]
    yield from _first(texts, "took more VRAM than their needs", problem=True)


def needs_changed(run: ActiveRun) -> Iterator[Line]:
    """Tests that took another amount than the one by which they are packed."""
    # Elsewhere nothing is admitted by what was learned, and nobody has to know.
    if "packed" in run.settings.presets:
        texts = [f"{text}: learned again" for text in _latest(run, "need-changed")]
        yield from _first(texts, "took other VRAM than when they last ran", problem=False)


def _latest(run: ActiveRun, kind: str) -> list[str]:
    """The last event of this kind of each test, in words."""
    found = {event.facts["nodeid"]: event for event in run.record.events(kind)}
    return [event.text for event in found.values()]


def _first(texts: Sequence[str], others: str, *, problem: bool) -> Iterator[Line]:
    """A line for each of the first few, and one with the number of the others."""
    for text in texts[:MOST]:
        yield Line(f"gpu-share: {text}", problem=problem)
    if len(texts) > MOST:
        more = plural(len(texts) - MOST, "test")
        yield Line(f"gpu-share: {more} more {others}", problem=problem)


class Sentence(NamedTuple):
    """A sentence of the verdict, with what stands under it."""

    text: str
    details: tuple[str, ...] = ()
    is_problem: bool = False
    is_ours: bool = False
    """Whether it fails the run under --gpu-share-strict."""
    mark: str = ""
    """The colour in a terminal, as of a `Line`."""


def verdict(server: MonitoredServer) -> list[Sentence]:
    """One sentence for each model that was loaded at any time, and one for each silence."""
    kept = (_on(life, server) for life in server.history.lives.values())
    return [*kept, *_silences(server)]


def _on(life: Life, server: MonitoredServer) -> Sentence:
    model = life.model
    spills = [spill for spill in server.spills if spill.model.name == model.name]
    if spills:
        return _spilled(spills, life, server)
    if life.spilled_before:
        return _spilled_before(life, server)
    if model.name in server.doubted:
        return Sentence(
            f"Ollama says that {described(model)}, but NVML shows "
            f"{format_gb(server.doubted[model.name])} of it: a part of it may be on the CPU",
            is_problem=True,
        )
    if not model.is_whole:
        return Sentence(f"Ollama held {described(model)}")
    where = f"on the GPU ({format_gb(model.size)}, 100 %)"
    return Sentence(f"Ollama kept {model.name} {where} {_how_long(life, server)}", mark="green")


def _how_long(life: Life, server: MonitoredServer) -> str:
    """`throughout`, or what was seen: between two answers it may have come and gone."""
    history = server.history
    words = "throughout"
    if history.silences or life.loads > (not life.from_the_start):
        words = "whenever Ollama was asked"
    if life.gone_at is not None:
        words = f"until it was unloaded {life.gone_at:.0f} s into the run"
    elif history.last_known is not None:
        words = f"until Ollama answered last, {history.last_known:.0f} s into the run"
    if life.from_the_start:
        return f"{words}; loaded again {_times(life.loads)}" if life.loads else words
    times = f"{_times(life.loads)}, first " if life.loads > 1 else ""
    return f"{words}; loaded {times}{life.loaded_at:.0f} s into the run"


def _times(count: int) -> str:
    """Changes of which some may have been missed between two answers."""
    return "at least once" if count == 1 else f"at least {count} times"


def _spilled(spills: list[Spill], life: Life, server: MonitoredServer) -> Sentence:
    # The worst one that the run answers for, else the worst of all.
    spill = max(spills, key=lambda spill: (spill.is_ours, spill.missing, -spill.at))
    # One reservation that suffices for all: with a smaller one the next run has another spill.
    spill = spill.with_largest(server.spills)
    model, promise = spill.model, server.promise
    again = f", and in part {life.spills - 1} more times" if life.spills > 1 else ""
    text = (
        f"Ollama put {format_gb(spill.missing)} of {model.name} ({format_gb(model.size)}) on the "
        f"CPU when it loaded the model {spill.at:.0f} s into the run{again}"
    )
    details = [
        held_by(spill),
        why(spill, promise.reservation, sum(promise.budgets.values())),
    ]
    unfit = next((s for s in spills if s.cause is not spill.cause and s.cause is Cause.SIZE), None)
    if unfit is not None and unfit.model.context != model.context:
        reason = why(unfit, promise.reservation, sum(promise.budgets.values()))
        details.append(f"at {unfit.model.context} tokens {reason}")
    if life.gone_at is None and life.model.is_whole:
        details.append(f"by the end all of it was on the GPU again ({format_gb(life.model.size)})")
    is_ours = any(spill.is_ours for spill in spills)
    return Sentence(text, tuple(details), is_problem=True, is_ours=is_ours, mark="red")


def _spilled_before(life: Life, server: MonitoredServer) -> Sentence:
    model: LoadedModel = life.model
    if life.loads and model.is_whole:
        return Sentence(
            f"Ollama has all of {model.name} on the GPU ({format_gb(model.size)}, 100 %) since a "
            "reload; before the tests a part of it was on the CPU",
            mark="green",
        )
    free = max((held.free for held in server.promise.start.values()), default=None)
    if uses_no_gpu(model, free):
        return Sentence(
            f"Ollama had {model.name} ({format_gb(model.size)}) in RAM before the tests began, "
            f"though {format_gb(free or 0)} of VRAM were free: {why_in_ram(model)}",
            is_problem=True,
        )
    text = (
        f"Ollama had a part of {model.name} on the CPU before the tests began "
        f"({format_gb(model.on_gpu)} of {format_gb(model.size)} on the GPU)"
    )
    if life.gone_at is not None:
        return Sentence(
            f"{text}, and unloaded it {life.gone_at:.0f} s into the run", is_problem=True
        )
    first = "" if has_room(model, free) else "free VRAM, then "
    return Sentence(
        f"{text}: a loaded model is never moved; {first}reload it (ollama stop {model.name})",
        is_problem=True,
    )


def _silences(server: MonitoredServer) -> Iterator[Sentence]:
    history = server.history
    if history.last_known is not None and not (
        history.silences and history.silences[-1][1] is None
    ):
        yield Sentence(
            f"Ollama did not answer from {history.last_known:.0f} s into the run to its end: what "
            "happened to its VRAM then is unknown",
            is_problem=True,
        )
    for since, until in server.history.silences:
        end = "to its end" if until is None else f"to {until:.0f} s"
        yield Sentence(
            f"Ollama did not answer from {since:.0f} s into the run {end}: what happened to its "
            "VRAM then is unknown",
            is_problem=True,
        )


def _overwritten(run: ActiveRun) -> Iterator[Line]:
    kind = " (an error under --gpu-share-strict)" if run.strict else ""
    for worker, how in sorted(run.overwritten.items()):
        text = f"gpu-share: {worker} does not see the GPU that it was given: {how}{kind}"
        yield Line(text, problem=True, mark=_mark(run))


def _mark(run: ActiveRun) -> str:
    """Red where a problem of this kind fails the run."""
    return "red" if run.strict else ""


def _verdict(run: ActiveRun) -> Iterator[Line]:
    for text in run.kept_loaded.given_up if run.kept_loaded is not None else ():
        yield Line(f"gpu-share: {text}")
    for host, monitor in run.monitors():
        where = f"{host}: " if host else ""
        if monitor.problem:
            text = f"{where}the monitor of Ollama's VRAM has failed: {monitor.problem}"
            yield Line(f"gpu-share: {text}", problem=True)
        for sentence in verdict(monitor.server) if monitor.server is not None else ():
            fails = sentence.is_ours and run.strict
            kind = " (an error under --gpu-share-strict)" if fails else ""
            yield Line(
                f"gpu-share: {where}{sentence.text}{kind}", sentence.is_problem, sentence.mark
            )
            for detail in sentence.details:
                yield Line(f"  {detail}", sentence.is_problem, sentence.mark)


def _unwritten(run: ActiveRun) -> Iterator[Line]:
    for text in run.unwritten:
        yield Line(f"gpu-share: {text}", problem=True)


_SUMMARY: tuple[Callable[[ActiveRun], Iterator[Line]], ...] = (
    _overwritten,
    lost_hosts,
    _verdict,
    routing,
    out_of_memory,
    needs_exceeded,
    needs_changed,
    _unwritten,
)


HINT = "gpu-share: hint:"
"""How a line begins that says what to change."""


def _hints(run: ActiveRun) -> Iterator[Line]:
    """What to change; at the very end what GPU tests lacked, with the best of it."""
    advice = list(assess(run).advice)
    lacking = gpu_tests_without_gpu(run)
    best = advice.pop(0) if lacking is not None and advice else None
    for each in advice:
        yield Line(f"{HINT} {each.text}")
    if lacking is not None:
        # Whoever has set them to be skipped without a GPU knows that.
        is_problem = bool(lacking.failed) or not run.plan.absence
        change = f": {best.change}" if best is not None else ""
        yield Line(f"gpu-share: {lacking.text}{change}", is_problem)


def summary(run: ActiveRun, view: OutputOptions) -> list[Line]:
    """The lines after the tests: problems that showed while they ran, what they used, and what to
    change; at -q one line where anything needs attention."""
    lines = [line for part in _SUMMARY for line in part(run)]
    if run.llm is not None:
        from pytest_gpushare.report.of_ollama import lines_of

        lines += lines_of(run, view)
    lines += [*usage_lines(run, view), *_hints(run)]
    return lines if view.verbosity >= 0 else _attention(run, lines)


def _attention(run: ActiveRun, lines: Sequence[Line]) -> list[Line]:
    """One line: the gravest problem of the run, its header included, and how many more."""
    # What is indented belongs to the line above.
    found = [line for line in lines if line.problem and not line.text.startswith(" ")]
    found = [*sorted(found, key=lambda line: line.mark != "red"), *header(run, -1)]
    if len(found) < 2:
        return found
    more = plural(len(found) - 1, "more problem")
    return [found[0]._replace(text=f"{found[0].text} (and {more}: run without -q)")]
