"""The models that the tests of a run use: which names mean the same process, what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pytest_gpushare.ollama.models import LoadedModel, ModelFacts, full_name


class RunModel(NamedTuple):
    """One model with one context, as the server would run it."""

    name: str = ""
    """As the user wrote it first; empty: unknown."""
    context: int = 0
    """Tokens of context that requests ask for; 0: none, the server's own."""
    facts: ModelFacts | None = None
    """What the server says of it; None where it was not asked."""
    names: tuple[str, ...] = ()
    """All names that the tests have for it."""

    @property
    def options(self) -> Mapping[str, int]:
        """The options of requests for it; others would have the server load it again."""
        return {"num_ctx": self.context} if self.context else {}

    @property
    def key(self) -> str:
        """What makes it one process of the server: its file, where that is known, and context."""
        blob = self.facts.blob if self.facts is not None else ""
        return f"{blob or full_name(self.name)}@{self.context}"

    @property
    def shown(self) -> str:
        """As messages name it."""
        if not self.name:
            return "an unknown model"
        return f"{self.name} at {self.context} tokens" if self.context else self.name

    def is_same(self, loaded: LoadedModel) -> bool:
        """Whether this is a loaded model, with the context that it has."""
        facts = self.facts
        known = {full_name(name) for name in self.names}
        same = full_name(loaded.name) in known or (
            facts is not None and bool(facts.digest) and facts.digest == loaded.digest
        )
        wanted = self.context or (facts.num_ctx if facts is not None else None)
        return same and (not wanted or not loaded.context or loaded.context == wanted)


def grouped(
    uses: Iterable[tuple[str, int]], facts: Mapping[str, ModelFacts]
) -> tuple[list[RunModel], dict[tuple[str, int], int]]:
    """The different models, and for each (name, context) which of them it means.

    Two names of one file are one process, and so are two contexts that the server cuts to the
    same. `facts` is by full name; what it lacks was not asked for.
    """
    models: dict[tuple[str, int], RunModel] = {}
    meant: dict[tuple[str, int], tuple[str, int]] = {}
    for use in dict.fromkeys(uses):
        name, declared = use
        found = facts.get(full_name(name)) if name else None
        context = _effective(declared, found)
        key = (
            (found.blob if found is not None else "") or (full_name(name) if name else ""),
            context,
        )
        meant[use] = key
        before = models.get(key)
        if before is None:
            models[key] = RunModel(name, context, found, (name,) if name else ())
        elif name not in before.names:
            models[key] = before._replace(names=(*before.names, name))
    numbers = {key: number for number, key in enumerate(models)}
    return list(models.values()), {use: numbers[key] for use, key in meant.items()}


def _effective(declared: int, facts: ModelFacts | None) -> int:
    """The context that decides: never more than the model's own; 0 where that is what it has."""
    if not declared or facts is None:
        return declared
    trained = _trained(facts)
    context = min(declared, trained) if trained else declared
    return 0 if context == facts.num_ctx else context


def _trained(facts: ModelFacts) -> int | None:
    info = facts.info or {}
    value = info.get(f"{info.get('general.architecture')}.context_length")
    return value if type(value) is int and value > 0 else None


def in_order(
    models: Sequence[RunModel], loaded: Sequence[LoadedModel], work: Sequence[float]
) -> list[int]:
    """The numbers of the models in the order to load them.

    What is loaded already comes first, as nothing has to be loaded for it and another model might
    evict it; then the most work (in seconds, or any measure), so that what is limited by its
    model does not come last. An unknown model comes at the end.
    """

    def rank(number: int) -> tuple[bool, bool, float, int]:
        model = models[number]
        is_there = any(model.is_same(each) for each in loaded)
        return (not model.name, not is_there, -work[number], number)

    return sorted(range(len(models)), key=rank)
