"""The models that a run loads for its tests, unloads again, or pulls; see `session/llm`."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pytest_gpushare.ollama.client import NonsenseError, StatusError, UnreachableError, connect
from pytest_gpushare.ollama.keep_alive import (
    KeepAlive,
    PreloadedModel,
    ask,
    hanging_up,
    load_kept,
    request,
    unload,
)
from pytest_gpushare.ollama.models import described, full_name
from pytest_gpushare.ollama.prediction import OVERHEAD
from pytest_gpushare.ollama.preload import ollama_pids
from pytest_gpushare.session.model_turns import ModelTurns
from pytest_gpushare.text import printable
from pytest_gpushare.timed import TimedCall

if TYPE_CHECKING:
    from pytest_gpushare.config.settings import Settings
    from pytest_gpushare.events import Record
    from pytest_gpushare.gpu.devices import GpuFacts
    from pytest_gpushare.gpu.readings import Live
    from pytest_gpushare.leases.lessee import Lessee
    from pytest_gpushare.ollama.address import Address
    from pytest_gpushare.ollama.models import LoadedModel, OllamaFacts, RunModel
    from pytest_gpushare.scheduler.types import ModelGroup
    from pytest_gpushare.wire import Links


UNLOAD_LIMIT = 30.0
"""Seconds until a model that was unloaded must be gone, its VRAM included."""

_TICK = 0.05
_RETRY = 0.5
"""Seconds between two tries while the server is busy."""
_MOST_PULL = 64 * 1024 * 1024
"""Bytes of progress that a server may send while it pulls."""


class ModelLoadError(Exception):
    """A model cannot be loaded; the text has the server's own words."""


class ReadyModel(NamedTuple):
    """A model that its tests can use now."""

    model: LoadedModel
    own: PreloadedModel | None = None
    """What this session loaded; None where it was loaded already."""
    seconds: float = 0.0


class Loader:
    """Loads and unloads models of one server; for one thread."""

    def __init__(
        self,
        server: Address,
        pids: Callable[[], frozenset[int] | None],
        is_over: Callable[[], bool],
    ) -> None:
        """`pids` are Ollama's processes that hold VRAM; `is_over` ends what is under way."""
        self._server, self._pids, self._is_over = server, pids, is_over

    def load(self, wanted: RunModel, limit: float) -> ReadyModel:
        """Have a model loaded with its options, within so many seconds. Raises `ModelLoadError`.

        A model that is there gets no request.
        """
        # Where nobody says what is there, the request does.
        with contextlib.suppress(TimeoutError, UnreachableError, NonsenseError):
            if (found := self._find(wanted)) is not None:
                return ReadyModel(found)
        began = time.monotonic()
        until = began + limit
        try:
            own = load_kept(
                lambda keep_alive: self._ask_to_load(wanted, keep_alive, until),
                lambda: self._find(wanted),
                self._pids,
                wanted.options,
            )
        except (TimeoutError, UnreachableError, NonsenseError) as error:
            raise ModelLoadError(_reason(error, limit)) from None
        if own is None:
            raise ModelLoadError("it was gone as soon as it was loaded")
        return ReadyModel(own.model, own, time.monotonic() - began)

    def unload(self, own: PreloadedModel) -> bool:
        """Unload what this session loaded, and wait until it is gone, its process too."""
        return unload(self._server, own, UNLOAD_LIMIT, lambda: self._is_there(own), self._is_over)

    def _is_there(self, own: PreloadedModel) -> bool:
        if any(model.name == own.model.name for model in ask(self._server)):
            return True
        pids = self._pids()
        return own.pid is not None and pids is not None and own.pid in pids

    def pull(self, name: str, limit: float, progress: Callable[[str, int | None], object]) -> None:
        """Pull a model within so many seconds. Raises `ModelLoadError`.

        `progress` is called with the server's words and per cent, where it reports them.
        """
        until = time.monotonic() + limit
        body = json.dumps({"model": name, "stream": True}).encode()

        def receive(line: bytes) -> None:
            status, share, problem = _progress_of(line)
            if problem:
                raise ModelLoadError(problem)
            progress(status, share)

        def pull(opened: Callable[..., object]) -> None:
            with contextlib.closing(connect(self._server, opened)) as connection:
                connection.post_lines("/api/pull", body, until, receive, _MOST_PULL)

        with hanging_up() as opened:
            call = TimedCall(lambda: pull(opened), "pull")
            try:
                self._wait(call, until)
            except ModelLoadError as error:
                raise ModelLoadError(f"it cannot be pulled: {error}") from None
            except (TimeoutError, UnreachableError, NonsenseError) as error:
                raise ModelLoadError(f"it cannot be pulled: {_reason(error, limit)}") from None

    def _find(self, wanted: RunModel) -> LoadedModel | None:
        return next((model for model in ask(self._server) if wanted.is_same(model)), None)

    def _ask_to_load(self, wanted: RunModel, keep_alive: str | None, until: float) -> None:
        """Repeats the request while the server is busy with loads of others."""
        while True:
            with hanging_up() as opened:
                ask_for = partial(request, self._server, wanted.name, keep_alive, until, opened)
                call = TimedCall(partial(ask_for, wanted.options), "load")
                try:
                    self._wait(call, until)
                    return
                except StatusError as error:
                    if error.status != 503 or time.monotonic() + _RETRY > until:
                        raise
            time.sleep(_RETRY)

    def _wait(self, call: TimedCall[None], until: float) -> None:
        while not call.wait(_TICK):
            if time.monotonic() > until or self._is_over():
                raise TimeoutError
        call.result()


def _progress_of(line: bytes) -> tuple[str, int | None, str]:
    """(words, per cent, problem) of a line that the server sends while it pulls."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return "", None, ""
    if not isinstance(value, dict):
        return "", None, ""
    problem = value.get("error")
    if isinstance(problem, str):
        return "", None, printable(problem, 300)
    status, total, done = value.get("status"), value.get("total"), value.get("completed")
    words = printable(status, 80) if isinstance(status, str) else ""
    if type(total) is int and type(done) is int and 0 <= done <= total and total:
        return words, done * 100 // total, ""
    return words, None, ""


def _reason(error: Exception, limit: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {limit:g} s"
    if isinstance(error, StatusError):
        return error.words or f"status {error.status}"
    return printable(str(error), 200) or "nothing listens there any more"


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
        self._pids = ollama_pids(run.live)
        self._loader = Loader(server, self._pids, self.is_over.is_set)
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
        try:
            if model.facts is not None and model.facts.is_missing and number not in self._pulled:
                self._pull(number)
            self._make_room(number)
            loaded = self._loader.load(model, float(run.settings.ollama_load_timeout))
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
            kept = KeepAlive(self._server, [own], self._pids)
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

    def _unload(self, number: int) -> None:
        """Unload what this session loaded for this group, and wait until it is gone."""
        if number not in self._ours:
            return
        lessee, (own, kept) = self._run.lessee, self._ours[number]
        if lessee is not None and full_name(own.model.name) in lessee.models_of_others():
            return
        del self._ours[number]
        kept.give_up()
        self._loader.unload(own)

    def _pull(self, number: int) -> None:
        run, name = self._run, self._models[number].name
        shown = -1

        def progress(words: str, share: int | None) -> None:
            nonlocal shown
            if share is not None and share // 10 != shown:
                shown = share // 10
                run.record.note("ollama-pull", f"Ollama pulls {name}: {words}, {share} %")

        run.record.note("ollama-pull", f"Ollama pulls {name}")
        self._loader.pull(name, float(run.settings.ollama_pull_timeout), progress)
        self._pulled.add(number)
