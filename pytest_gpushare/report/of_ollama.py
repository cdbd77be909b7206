"""What the summary says of tests that use models of Ollama's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pytest_gpushare.ollama.models import full_name
from pytest_gpushare.report.header import Line, OutputOptions
from pytest_gpushare.units import plural

if TYPE_CHECKING:
    from pytest_gpushare.session.llm import LlmTests
    from pytest_gpushare.session.run import ActiveRun


def lines_of(run: ActiveRun, view: OutputOptions) -> Iterator[Line]:
    """The lines; none in a run without such tests."""
    llm = run.llm
    if llm is None:
        return
    kind = " (an error under --gpu-share-strict)" if run.strict else ""
    for why, count in llm.refused.items():
        outcome, _, reason = why.partition(": ")
        yield Line(f"gpu-share: {plural(count, 'test')} {outcome}: {reason}{kind}", problem=True)
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


def document_of(llm: LlmTests) -> dict[str, Any]:
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
        "not_run": [{"reason": why, "tests": count} for why, count in llm.refused.items()],
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
