"""What the summary says of tests that use models of Ollama's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytest_gpushare.report.header import Line
from pytest_gpushare.units import plural

if TYPE_CHECKING:
    from pytest_gpushare.session.llm import LlmTests
    from pytest_gpushare.session.run import ActiveRun


def lines_of(run: ActiveRun) -> Iterator[Line]:
    """The lines; none in a run without such tests."""
    llm = run.llm
    if llm is None:
        return
    kind = " (an error under --gpu-share-strict)" if run.strict else ""
    for why, count in llm.refused.items():
        outcome, _, reason = why.partition(": ")
        yield Line(f"gpu-share: {plural(count, 'test')} {outcome}: {reason}{kind}", problem=True)
    for event in run.record.events("ollama-not-loaded", "ollama-marker"):
        yield Line(f"gpu-share: {event.text}", problem=event.kind == "ollama-not-loaded")
    yield from _loads(llm)
    for model, (tokens, seconds) in llm.answers().items():
        rate = f", {tokens / seconds:.1f} tokens/s" if seconds else ""
        yield Line(f"gpu-share: {model} gave {tokens} tokens in recorded answers{rate}")
    for text in llm.given_up:
        yield Line(f"gpu-share: {text}")


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
