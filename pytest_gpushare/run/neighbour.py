"""What is known of Ollama while the run lasts: its models, and who held what when they loaded."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_gpushare.plan import ollama_history
from pytest_gpushare.plan.holding import Held
from pytest_gpushare.plan.ollama_history import Change, History
from pytest_gpushare.probe.facts import LoadedModel
from pytest_gpushare.run.record import Record
from pytest_gpushare.units import GB

if TYPE_CHECKING:
    from pytest_gpushare.plan.promise import Promise
    from pytest_gpushare.plan.spill import Spill

_MOST_SAMPLES = 600
_MOST_SPILLS = 1000
_LOADED_PER_SECOND = GB
"""A model that is being loaded is in no answer: it may have been decided so long ago."""

EVERY = 1.0
"""Seconds between looks at whose VRAM is whose."""

Look = Callable[[Sequence[LoadedModel], bool], Mapping[str, Held]]
"""What is held now, by device, given the models that Ollama has loaded, and whether to tell by
whom."""


class Neighbour:
    """The answers of one server, judged by what was held when they came."""

    def __init__(
        self,
        models: Sequence[LoadedModel] | None,
        promise: Promise,
        look: Look,
        record: Record,
        saw: Callable[[LoadedModel, int | None], None] = lambda _model, _used: None,
    ) -> None:
        """`models` are those at the start, None where the server did not answer; `saw` is told
        what a loaded model takes, in bytes of its process where NVML tells them."""
        self.history = History(models)
        self.promise = promise
        self.spills: list[Spill] = []
        self.doubted: dict[str, int] = {}
        """Model -> bytes that NVML shows of Ollama's, where the server says that more of the
        model is on the GPU."""
        self.is_over = False
        """Whether the last answer was asked for."""
        self._look, self._record, self._saw = look, record, saw
        self._samples: deque[tuple[float, Mapping[str, Held]]] = deque(maxlen=_MOST_SAMPLES)
        self._samples.append((0.0, promise.start))
        self._split_at = 0.0
        self._lock = threading.Lock()

    @property
    def is_worth_asking(self) -> bool:
        """Whether the server was heard when it was asked last."""
        return self.history.answered_at is not None and not self.history.failures

    def resident(self) -> Mapping[str, int]:
        """UUID -> bytes that Ollama holds there now."""
        with self._lock:
            return {uuid: held.ollama for uuid, held in self._samples[-1][1].items()}

    def sample(self, *, by_worker: bool = False) -> None:
        """Look at how much is held, and once a second, or when it matters, by whom."""
        now = self._record.now()
        by_worker = by_worker or now - self._split_at >= EVERY
        held = self._look(self.history.models, by_worker)
        if by_worker:
            self._split_at = now
        if held:
            with self._lock:
                self._samples.append((now, held))

    def answer(self, models: Sequence[LoadedModel]) -> None:
        """The server has told its models."""
        changes = self.history.look(self._record.now(), models)
        if changes:
            self.sample(by_worker=True)
            self._learn(models)
        for change in changes:
            self._note(change)
        self._doubt()

    def silence(self, problem: str, *, certain: bool) -> None:
        """The server has not told anything."""
        for change in self.history.fail(self._record.now(), problem, certain=certain):
            self._note(change)

    def end(self) -> None:
        """Nothing more will be asked."""
        self.is_over = True

    def _learn(self, models: Sequence[LoadedModel]) -> None:
        """What a model takes is known best where it is alone."""
        with self._lock:
            seen = [held.seen_of_ollama for held in self._samples[-1][1].values()]
        known = sum(size for size in seen if size is not None)
        for model in models:
            self._saw(model, known if known and len(models) == 1 else None)

    def _note(self, change: Change) -> None:
        # In most runs Ollama changes nothing: no start pays for the words.
        from pytest_gpushare.plan import ollama_words

        facts = self._facts(change)
        if change.kind != ollama_history.SPILLED:
            self._record.note(change.kind, ollama_words.sentence(change), **facts)
            return
        spill = self._judge(change)
        if len(self.spills) < _MOST_SPILLS:
            self.spills.append(spill)
        facts |= {"cause": spill.cause.value, "under_tests": spill.is_ours}
        if spill.setting is not None:
            facts["setting"] = {spill.setting.key: spill.setting.value}
        self._record.note(change.kind, ollama_words.spilled(spill), **facts)

    def _judge(self, change: Change) -> Spill:
        from pytest_gpushare.plan.spill import judge

        model = change.model
        assert model is not None
        began = change.since - model.size / _LOADED_PER_SECOND
        with self._lock:
            samples = list(self._samples)
        window = [held for at, held in samples if at >= began] or [samples[-1][1]]
        beside = [other for other in self.history.models if other.name != model.name]
        return judge(change.at, model, beside, window, self.promise)

    def _doubt(self) -> None:
        """Ollama may say `100 % GPU` of what it could not see: does NVML show as much?"""
        with self._lock:
            held = self._samples[-1][1].values()
        seen = [device.seen_of_ollama for device in held]
        shown = sum(size for size in seen if size is not None)
        if not any(size is not None for size in seen):
            shown = sum(device.used for device in held)
        told = sum(model.size_vram for model in self.history.models)
        self.doubted = {}
        if held and shown < told // 2:
            self.doubted = {m.name: shown for m in self.history.models if m.is_whole}

    def _facts(self, change: Change) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        if change.model is not None:
            facts |= {
                "model": change.model.name,
                "size_bytes": change.model.size,
                "size_vram_bytes": change.model.size_vram,
                "context": change.model.context,
            }
        if change.problem:
            facts["problem"] = change.problem
        with self._lock:
            held = self._samples[-1][1]
        facts["held"] = {
            uuid: {
                "ollama_bytes": device.ollama,
                "workers_bytes": None if device.workers is None else dict(device.workers),
                "others_bytes": device.others,
                "free_bytes": device.free,
            }
            for uuid, device in held.items()
        }
        return facts
