"""The models that this run loads for its tests, one thread after another; see `session/llm`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pytest_gpushare.ollama.keep_alive import KeepAlive, PreloadedModel
from pytest_gpushare.ollama.loading import Loader, ModelLoadError
from pytest_gpushare.ollama.models import described, full_name
from pytest_gpushare.ollama.prediction import OVERHEAD
from pytest_gpushare.ollama.preload import ollama_pids
from pytest_gpushare.session.model_turns import ModelTurns

if TYPE_CHECKING:
    from pytest_gpushare.config.settings import Settings
    from pytest_gpushare.events import Record
    from pytest_gpushare.gpu.devices import GpuFacts
    from pytest_gpushare.gpu.sampler import Live
    from pytest_gpushare.leases.lessee import Lessee
    from pytest_gpushare.ollama.address import Address
    from pytest_gpushare.ollama.models import OllamaFacts
    from pytest_gpushare.ollama.run_models import RunModel
    from pytest_gpushare.scheduler.types import ModelGroup
    from pytest_gpushare.wire import Links


class RunParts(Protocol):
    """What of the active run matters here."""

    settings: Settings
    gpus: GpuFacts
    ollama: OllamaFacts
    record: Record
    links: Links
    live: Live | None
    lessee: Lessee | None
    shares_models: bool
    """Whether tests of other sessions of the host may use the same server, by agreement."""


class Load(NamedTuple):
    """A model that was loaded for its tests."""

    model: str
    at: float
    """Seconds since the run started."""
    seconds: float


class Phase(NamedTuple):
    """The time in which tests of one model ran."""

    model: str
    start: float
    """Seconds since the run started."""
    end: float


class ModelLoads:
    """Loads, keeps and unloads the models of the groups, each after its turn."""

    def __init__(
        self,
        run: RunParts,
        server: Address,
        models: Sequence[RunModel],
        groups: Sequence[ModelGroup],
        wake: Callable[[], object],
    ) -> None:
        """`wake` has the dispatcher called in xdist's thread."""
        self._run, self._server, self._models, self._groups = run, server, models, groups
        self.is_over = threading.Event()
        """Ends what is under way."""
        self.loads: list[Load] = []
        self.phases: list[Phase] = []
        """Of the models that nothing uses any more."""
        self.sizes: dict[int, int] = {}
        """Group -> bytes that its model takes."""
        self._kept: list[KeepAlive] = []
        """All that were kept in this run."""
        self._since: dict[int, float] = {}
        """The groups whose models this session uses now -> since when."""
        self._ours: dict[int, tuple[PreloadedModel, KeepAlive]] = {}
        """Group -> what this session loaded for it and has not unloaded."""
        self._pulled: set[int] = set()
        self.turns: ModelTurns | None = None
        """Where other sessions of the host may use the server, too."""
        if run.lessee is not None and run.shares_models:
            self.turns = ModelTurns(
                run.lessee, server.shown, models, run.settings, run.record.note, wake
            )

    @property
    def given_up(self) -> list[str]:
        """A sentence on each model that was not kept loaded any more."""
        return [text for kept in self._kept for text in kept.given_up]

    def is_open(self, number: int) -> bool:
        """Whether the model of a group was opened, and not closed since."""
        return number in self._since

    def close_others(self, number: int) -> None:
        """Close all but this group."""
        for other in [each for each in self._since if each != number]:
            self.close(other, makes_room=False)

    def end(self) -> None:
        """Give the models back."""
        for _, kept in self._ours.values():
            kept.stop()
        self._ours.clear()
        self._note_phases(list(self._since))

    def open(self, number: int) -> str:
        """Why the model of this group cannot be used; empty where it can."""
        model, run = self._models[number], self._run
        if not self._groups[number].loads or not model.name:
            return ""
        self.take_turn(number)
        self._since[number] = run.record.now()
        loader = self._loader()
        try:
            if model.facts is not None and model.facts.is_missing and number not in self._pulled:
                self._pull(loader, number)
            self._make_room(number)
            loaded = loader.load(model, float(run.settings.ollama_load_timeout))
        except ModelLoadError as error:
            self.close(number, makes_room=False)
            where = f"at {run.ollama.address}"
            text = f"Ollama {where} cannot load {model.shown}: {error}"
            run.record.note("ollama-not-loaded", text, model=model.name)
            return text
        if loaded.model.on_gpu:
            self.sizes[number] = loaded.model.on_gpu + OVERHEAD
        own = loaded.own or (self._ours[number][0] if number in self._ours else None)
        if own is not None:
            kept = KeepAlive(self._server, [own], ollama_pids(run.live))
            if run.lessee is not None:
                kept.used_by_others = run.lessee.models_of_others
            kept.start()
            self._kept.append(kept)
            self._ours[number] = own, kept
        if loaded.own is not None:
            self.loads.append(Load(model.shown, run.record.now(), loaded.seconds))
            run.record.note(
                "ollama-loaded-for-tests",
                f"Ollama loaded {described(loaded.model)} for its tests ({loaded.seconds:.1f} s)",
                model=model.name,
                seconds=round(loaded.seconds, 3),
            )
        return ""

    def take_turn(self, number: int, on_wait: Callable[[], object] = lambda: None) -> None:
        """Wait until other sessions leave the server to this model, and a place to a test."""
        if self.turns is not None:
            self.turns.take(number, self.is_over, on_wait)

    def close(self, number: int, *, makes_room: bool) -> None:
        """Nothing of this session uses the model any more."""
        self._note_phases([number])
        turns = self.turns
        # Another session's model may not fit next to it.
        if makes_room or (turns is not None and turns.others_wait()):
            self._unload(number)
        if number in self._ours:
            self._ours[number][1].stop()
        if turns is not None:
            turns.give_back(number)

    def _make_room(self, number: int) -> None:
        """Unload what this session loaded for other tests: the server would not make room for
        a model that does not fit next to it, but put a part of the new one on the CPU."""
        if self._run.live is not None:
            for other in [each for each in self._ours if each != number]:
                self._unload(other)

    def _note_phases(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            since = self._since.pop(number, None)
            if since is not None:
                name, now = self._models[number].shown, self._run.record.now()
                self.phases.append(Phase(name, since, now))

    def _loader(self) -> Loader:
        return Loader(self._server, ollama_pids(self._run.live), self.is_over.is_set)

    def _unload(self, number: int) -> None:
        """Unload what this session loaded for this group, and wait until it is gone."""
        if number not in self._ours:
            return
        lessee, (own, kept) = self._run.lessee, self._ours[number]
        if lessee is not None and full_name(own.model.name) in lessee.models_of_others():
            return
        del self._ours[number]
        kept.give_up()
        self._loader().unload(own)

    def _pull(self, loader: Loader, number: int) -> None:
        run, name = self._run, self._models[number].name
        shown = -1

        def progress(words: str, share: int | None) -> None:
            nonlocal shown
            if share is not None and share // 10 != shown:
                shown = share // 10
                run.record.note("ollama-pull", f"Ollama pulls {name}: {words}, {share} %")

        run.record.note("ollama-pull", f"Ollama pulls {name}")
        loader.pull(name, float(run.settings.ollama_pull_timeout), progress)
        self._pulled.add(number)
