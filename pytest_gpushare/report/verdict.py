"""The last word on Ollama: whether its models stayed on the GPU, and if not, why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.plan.ollama_history import Life
from pytest_gpushare.plan.placed import placed
from pytest_gpushare.probe.facts import LoadedModel
from pytest_gpushare.run.neighbour import Neighbour
from pytest_gpushare.units import format_gb

if TYPE_CHECKING:
    from pytest_gpushare.plan.spill import Spill


class Word(NamedTuple):
    """A sentence of the verdict, with what stands under it."""

    text: str
    details: tuple[str, ...] = ()
    is_problem: bool = False
    is_ours: bool = False
    """Whether it fails the run under --gpu-share-strict."""


def verdict(book: Neighbour) -> list[Word]:
    """One word for each model that was loaded at any time, and one for each silence."""
    words = [_on(life, book) for life in book.history.lives.values()]
    return [*words, *_silences(book)]


def _on(life: Life, book: Neighbour) -> Word:
    model = life.model
    spills = [spill for spill in book.spills if spill.model.name == model.name]
    if spills:
        return _spilled(spills, life, book)
    if life.spilled_before:
        return _spilled_before(life)
    if model.name in book.doubted:
        return Word(
            f"Ollama says that {placed(model)}, but NVML shows "
            f"{format_gb(book.doubted[model.name])} of it: a part of it may be on the CPU",
            is_problem=True,
        )
    if not model.is_whole:
        return Word(
            f"Ollama held {placed(model)}: that is more than its size, so nobody "
            "knows whether all of it is there"
        )
    where = f"on the GPU ({format_gb(model.size)}, 100 %)"
    return Word(f"Ollama kept {model.name} {where} {_how_long(life, book)}")


def _how_long(life: Life, book: Neighbour) -> str:
    """`throughout; loaded 3 s into the run`, or what can be said for certain."""
    words = "whenever it answered" if book.history.silences else "throughout"
    if life.gone_at is not None:
        words = f"until it was unloaded {life.gone_at:.0f} s into the run"
    if life.loads > 1:
        return f"{words}; loaded {life.loads} times"
    if life.loads and not life.from_the_start and life.gone_at is None:
        return f"{words}; loaded {life.loaded_at:.0f} s into the run"
    return f"{words}; reloaded once" if life.loads and life.from_the_start else words


def _spilled(spills: list[Spill], life: Life, book: Neighbour) -> Word:
    from pytest_gpushare.plan import ollama_words

    # The worst one that the run answers for, else the worst of all.
    spill = max(spills, key=lambda spill: (spill.is_ours, spill.missing, -spill.at))
    model, promise = spill.model, book.promise
    again = f", and in part {life.spills - 1} more times" if life.spills > 1 else ""
    text = (
        f"Ollama put {format_gb(spill.missing)} of {model.name} ({format_gb(model.size)}) on the "
        f"CPU, not on the GPU, when it loaded it {spill.at:.0f} s into the run{again}"
    )
    details = [
        ollama_words.held(spill),
        ollama_words.why(spill, promise.reservation, sum(promise.budgets.values())),
    ]
    if life.gone_at is None and life.model.is_whole:
        details.append(f"by the end all of it was on the GPU again ({format_gb(life.model.size)})")
    return Word(text, tuple(details), is_problem=True, is_ours=any(s.is_ours for s in spills))


def _spilled_before(life: Life) -> Word:
    model: LoadedModel = life.model
    if life.loads and model.is_whole:
        return Word(
            f"Ollama has all of {model.name} on the GPU ({format_gb(model.size)}, 100 %) since a "
            "reload; before the tests a part of it was on the CPU"
        )
    return Word(
        f"Ollama had a part of {model.name} on the CPU before the tests began "
        f"({format_gb(model.size_vram)} of {format_gb(model.size)} on the GPU): a loaded model is "
        f"never moved; free VRAM, then reload it (ollama stop {model.name})",
        is_problem=True,
    )


def _silences(book: Neighbour) -> Iterator[Word]:
    for since, until in book.history.silences:
        end = "to its end" if until is None else f"to {until:.0f} s"
        yield Word(
            f"Ollama did not answer from {since:.0f} s into the run {end}: what happened to its "
            "VRAM then is unknown",
            is_problem=True,
        )
