"""What happened to Ollama's models, from one answer of `/api/ps` to the next.

Ollama places a model when it loads it, and never moves it: so whatever differs between two
answers is a load. `expires_at` is not looked at, as it is past while a request
runs. From Ollama 0.30 on a model that is being loaded is in no answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pytest_gpushare.ollama.models import LoadedModel, described
from pytest_gpushare.units import format_gb

LOADED, UNLOADED, RELOADED = "ollama-loaded", "ollama-unloaded", "ollama-reloaded"
SPILLED, RECOVERED = "ollama-spilled", "ollama-recovered"
UNREACHABLE, BACK = "ollama-unreachable", "ollama-back"

FORGIVEN = 1
"""Answers that may fail to come before a server that was there counts as unreachable: during an
unload `/api/ps` may block for seconds."""

STALE = 60.0
"""Seconds after the last answer for which nothing can be claimed any more."""

MOST_LIVES = 256
"""Models of which the life is kept; a server that invents new names must not fill the memory."""


class Change(NamedTuple):
    """Something that happened to a model, or to the server."""

    at: float
    """Seconds since the run started, when it was noticed."""
    kind: str
    model: LoadedModel | None = None
    """As it is now; as it was, where it is gone."""
    before: LoadedModel | None = None
    """As it was, where it is not new."""
    problem: str = ""
    """Why the server does not answer."""
    since: float = 0.0
    """When the last answer before it came: it happened between the two. `at` for the first."""


@dataclass
class Life:
    """What is known of one model over the whole run."""

    model: LoadedModel
    """As it was seen last."""
    from_the_start: bool
    """Whether it was there when the run began, or when the server first answered."""
    spilled_before: bool
    """Whether a part of it was on the CPU then."""
    loaded_at: float | None = None
    """When it was first seen to be loaded; None where it was there from the start."""
    gone_at: float | None = None
    """When it was seen to be gone; None while it is there."""
    loads: int = 0
    """How often it was loaded or reloaded during the run."""
    spills: int = 0
    """How many of these loads left a part of it on the CPU."""


class History:
    """The models of one server; same answers, same changes."""

    def __init__(self, models: Iterable[LoadedModel] | None, at: float = 0.0) -> None:
        """`models` are those at the start; None where the server has not answered yet."""
        self.lives: dict[str, Life] = {}
        self.answered_at: float | None = None
        """When the last answer came."""
        self.silences: list[tuple[float, float | None]] = []
        """From when to when the server was unreachable after it had answered."""
        self._now: dict[str, LoadedModel] = {}
        self.ended_at: float | None = None
        """When the last question was over; None while more will be asked."""
        self._failures = 0
        self._silent = models is None
        if models is not None:
            self._begin(at, models)

    @property
    def models(self) -> tuple[LoadedModel, ...]:
        """The models that are loaded, as far as is known."""
        return tuple(self._now.values())

    @property
    def failures(self) -> int:
        """Answers that failed to come in succession."""
        return self._failures

    def fail(self, at: float, problem: str, *, certain: bool = False) -> list[Change]:
        """No answer came; `certain` where nothing listens any more."""
        self._failures += 1
        if self._silent or self.answered_at is None:
            return []
        if not certain and self._failures <= FORGIVEN:
            return []
        self._silent = True
        self.silences.append((self.answered_at, None))
        return [Change(at, UNREACHABLE, problem=problem, since=self.answered_at)]

    def end(self, at: float) -> None:
        """Nothing more will be asked."""
        self.ended_at = at

    @property
    def last_known(self) -> float | None:
        """Up to when the answers reach, where they do not reach to the end of the run."""
        if self.answered_at is None or self.ended_at is None:
            return None
        is_stale = self._failures > 0 or self.ended_at - self.answered_at > STALE
        return self.answered_at if is_stale else None

    def look(self, at: float, models: Iterable[LoadedModel]) -> list[Change]:
        """What has changed with this answer."""
        self._failures = 0
        changes = []
        if self._silent:
            self._silent = False
            since = at if self.answered_at is None else self.answered_at
            changes.append(Change(at, BACK, since=since))
            if self.silences:
                self.silences[-1] = (self.silences[-1][0], at)
        if self.answered_at is None:
            # When these were loaded is unknown: they count as there from the start.
            self._begin(at, models)
            return changes
        since, self.answered_at = self.answered_at, at
        found = {model.name: _unmoved(model) for model in models}
        gone = [model for name, model in self._now.items() if name not in found]
        changes += [self._unloaded(at, since, model) for model in gone]
        for model in found.values():
            changes += self._seen(at, since, model)
        self._now = found
        return changes

    def _begin(self, at: float, models: Iterable[LoadedModel]) -> None:
        self.answered_at = at
        self._now = {model.name: _unmoved(model) for model in models}
        for model in self._now.values():
            self._keep(Life(model, from_the_start=True, spilled_before=model.is_spilled))

    def _unloaded(self, at: float, since: float, model: LoadedModel) -> Change:
        if life := self.lives.get(model.name):
            life.gone_at = at
        return Change(at, UNLOADED, model, model, since=since)

    def _seen(self, at: float, since: float, model: LoadedModel) -> list[Change]:
        before = self._now.get(model.name)
        if before == model:
            return []
        life = self.lives.get(model.name)
        last = life.model if life else None
        if life is None:
            life = self._keep(Life(model, from_the_start=False, spilled_before=False, loaded_at=at))
        life.model, life.gone_at, life.loads = model, None, life.loads + 1
        changes = [Change(at, LOADED if before is None else RELOADED, model, before, since=since)]
        if model.is_spilled:
            life.spills += 1
            changes.append(Change(at, SPILLED, model, before, since=since))
        elif last is not None and last.is_spilled and model.is_whole:
            changes.append(Change(at, RECOVERED, model, last, since=since))
        return changes

    def _keep(self, life: Life) -> Life:
        if len(self.lives) < MOST_LIVES:
            self.lives[life.model.name] = life
        return life


def _unmoved(model: LoadedModel) -> LoadedModel:
    """The model without the moment of its end, which every request moves."""
    return model._replace(expires_at="")


def differences(before: LoadedModel, now: LoadedModel) -> Mapping[str, tuple[object, object]]:
    """What of a model changed in a reload: the word for it -> (before, now)."""
    pairs = {
        "context": (before.context, now.context),
        "digest": (before.digest, now.digest),
        "size": (before.size, now.size),
        "VRAM": (before.size_vram, now.size_vram),
    }
    return {word: pair for word, pair in pairs.items() if pair[0] != pair[1]}


def sentence(change: Change) -> str:
    """What happened, for the record."""
    if change.kind == UNREACHABLE:
        return f"Ollama does not answer any more: {change.problem}"
    if change.kind == BACK:
        return "Ollama answers again" if change.since < change.at else "Ollama answers"
    model, before = change.model, change.before
    assert model is not None
    if change.kind == UNLOADED:
        return f"Ollama unloaded {model.name} ({format_gb(model.size)})"
    if change.kind == RECOVERED:
        return f"Ollama has all of {model.name} on the GPU again ({format_gb(model.size)})"
    if change.kind == RELOADED and before is not None:
        return f"Ollama reloaded {described(model)}{_changed(before, model)}"
    return f"Ollama loaded {described(model)}"


def _changed(before: LoadedModel, now: LoadedModel) -> str:
    """`; context 4096, now 8192`: what a request asked for that made it reload."""
    changed = differences(before, now)
    parts = []
    if "context" in changed and before.context and now.context:
        parts.append(f"context {before.context}, now {now.context}")
    if "digest" in changed:
        parts.append("another version of the model")
    if "size" in changed:
        parts.append(f"size {format_gb(before.size)}, now {format_gb(now.size)}")
    return f"; {', '.join(parts)}" if parts else ""
