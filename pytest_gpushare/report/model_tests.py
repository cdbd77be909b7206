"""What the summary says of tests that use models of Ollama's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

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
    yield from _loads(llm)
    for model, (tokens, seconds) in llm.answers().items():
        rate = f", {tokens / seconds:.1f} tokens/s" if seconds else ""
        yield Line(f"gpu-share: {model} gave {tokens} tokens in recorded answers{rate}")
    if _could_be_phased(run, llm):
        yield Line(
            "gpu-share: hint: the next run keeps VRAM for Ollama only while tests use its models: "
            "it knows now that they do"
        )
    for text in llm.given_up:
        yield Line(f"gpu-share: {text}")


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


def _loads(llm: LlmTests) -> Iterator[Line]:
    used = [group for group in llm.groups if group.refusal is None]
    if not used:
        return
    tests = plural(llm.tests - sum(llm.refused.values()), "test")
    models = plural(len(used), "model")
    text = f"gpu-share: {tests} used {models} of Ollama's"
    if llm.loads:
        seconds = sum(load.seconds for load in llm.loads)
        text += f": {plural(len(llm.loads), 'load')}, {seconds:.1f} s"
    yield Line(text)
