"""What the reports say of Ollama: what became of its models, and the tests that use them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpushare.ollama.history import Life
from pytest_gpushare.ollama.models import LoadedModel, described, full_name
from pytest_gpushare.ollama.monitor import MonitoredServer
from pytest_gpushare.ollama.spill import Cause, has_room, held_by, uses_no_gpu, why, why_in_ram
from pytest_gpushare.report.output import Line, OutputOptions
from pytest_gpushare.units import format_gb, plural

if TYPE_CHECKING:
    from pytest_gpushare.ollama.spill import Spill
    from pytest_gpushare.session.llm import LlmTests
    from pytest_gpushare.session.run import ActiveRun


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
    silences = list(server.history.silences)
    last = server.history.last_known
    if last is not None and not (silences and silences[-1][1] is None):
        silences.insert(0, (last, None))
    for since, until in silences:
        end = "to its end" if until is None else f"to {until:.0f} s"
        yield Sentence(
            f"Ollama did not answer from {since:.0f} s into the run {end}: what happened to its "
            "VRAM then is unknown",
            is_problem=True,
        )


def as_error(run: ActiveRun) -> str:
    """What stands behind a problem that fails the run."""
    return " (an error under --gpu-share-strict)" if run.strict else ""


def lines_of_tests(run: ActiveRun, view: OutputOptions) -> Iterator[Line]:
    """The lines; none in a run without such tests."""
    llm = run.llm
    if llm is None:
        return
    for refusal, count in llm.refused.items():
        outcome, _, reason = refusal.partition(": ")
        yield Line(
            f"gpu-share: {plural(count, 'test')} {outcome}: {reason}{as_error(run)}", problem=True
        )
    if view.verbosity >= 2 and llm.estimate is not None and llm.estimate.seconds:
        yield Line(
            f"gpu-share: tests that use models, as estimated: {llm.estimate.text} "
            f"(gpu_share_ollama_phase = {run.settings.ollama_phase})"
        )
    for event in run.record.events("ollama-not-loaded", "ollama-marker"):
        yield Line(f"gpu-share: {event.text}", problem=event.kind == "ollama-not-loaded")
    yield from _loads(run, llm)
    if view.verbosity >= 1:
        for event in run.record.events("ollama-waited"):
            yield Line(f"gpu-share: {event.text}")
    for model, (tokens, seconds) in llm.answers().items():
        rate = f", {tokens / seconds:.1f} tokens/s" if seconds else ""
        yield Line(f"gpu-share: {model} gave {tokens} tokens in recorded answers{rate}")
    if _could_be_phased(run, llm):
        yield Line(
            "gpu-share: hint: the next run keeps VRAM for Ollama only while tests use its models: "
            "it knows now that they do"
        )
    yield from _hints(run, llm)
    for text in llm.given_up:
        yield Line(f"gpu-share: {text}")


def document_of_tests(llm: LlmTests) -> dict[str, Any]:
    """The same for the JSON report."""
    return {
        "tests": llm.tests,
        "phase": None if llm.estimate is None else llm.estimate.chosen,
        "loads": [
            {"model": load.model, "at_s": round(load.at, 3), "seconds": round(load.seconds, 3)}
            for load in llm.loads
        ],
        "phases": [
            {"model": each.model, "start_s": round(each.start, 3), "end_s": round(each.end, 3)}
            for each in llm.phases
        ],
        "not_run": [{"reason": reason, "tests": count} for reason, count in llm.refused.items()],
        "answers": [
            {"model": model, "tokens": tokens, "seconds": round(seconds, 3)}
            for model, (tokens, seconds) in llm.answers().items()
        ],
    }


def _with_another_context(run: ActiveRun, llm: LlmTests) -> set[str]:
    """Names of models that were last seen with a context that no test declares.

    Reloads between two questions to the server leave no other trace.
    """
    server = run.monitor.server if run.monitor is not None else None
    if server is None:
        return set()
    declared: dict[str, set[int]] = {}
    for model in llm.models:
        for name in model.names:
            declared.setdefault(full_name(name), set()).add(model.context)
    seen = {name: life.model.context for name, life in server.history.lives.items()}
    return {
        name
        for name, contexts in declared.items()
        # 0 is the server's own context, whatever that is.
        if seen.get(name) and 0 not in contexts and seen[name] not in contexts
    }


_WORTH_A_HINT = 10.0
"""Seconds of tests that wait for one another."""


def _hints(run: ActiveRun, llm: LlmTests) -> Iterator[Line]:
    """What costs time: calls that load a model again, and tests that run one at a time."""
    reloaded = {str(event.facts.get("model")) for event in run.record.events("ollama-reloaded")}
    reloaded |= _with_another_context(run, llm)
    for model in llm.models:
        if model.context and reloaded & {full_name(name) for name in model.names}:
            yield Line(
                f"gpu-share: hint: {model.name} was loaded again while its tests ran: a call "
                "without its context, such as one by OpenAI's paths, does that; a model of your "
                f"own with PARAMETER num_ctx {model.context} keeps one context",
            )
    busy = sum(
        test.end - test.start
        for test in run.tests
        if llm.uses(test.nodeid) and test.start is not None and test.end is not None
    )
    took, workers = run.record.now(), run.plan.workers
    if run.settings.ollama_parallel == 1 and workers > 1 and busy > max(_WORTH_A_HINT, took / 2):
        yield Line(
            f"gpu-share: hint: tests that use models ran one at a time, for {busy:.0f} s of "
            f"{took:.0f} s: a server with OLLAMA_NUM_PARALLEL = 2 answers two, with "
            "gpu_share_ollama_parallel = 2"
        )


def _could_be_phased(run: ActiveRun, llm: LlmTests) -> bool:
    """Whether the plan kept VRAM as it could not know that tests say which models they use."""
    settings = run.settings
    return (
        not llm.holds_vram
        and settings.ollama_vram_reservation is None
        and settings.ollama_phase != "beside"
        and bool(run.plan.slots)
        and run.ollama.answered
        and run.ollama.on_this_host
        and any(group.loads for group in llm.groups)
    )


def _loads(run: ActiveRun, llm: LlmTests) -> Iterator[Line]:
    used = [group for group in llm.groups if group.refusal is None]
    if not used or run.gpus.simulated:
        return
    tests = plural(llm.tests - sum(llm.refused.values()), "test")
    models = plural(len(used), "Ollama model")
    text = f"gpu-share: {tests} used {models}"
    if llm.loads:
        seconds = sum(load.seconds for load in llm.loads)
        text += f": {plural(len(llm.loads), 'load')}, {seconds:.1f} s"
    yield Line(text)
