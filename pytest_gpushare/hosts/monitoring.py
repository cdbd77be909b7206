"""Ollama on another host, monitored from here: its answers come over the host's connection."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.events import Record
from pytest_gpushare.gpu.attribution import Attribution, Statement
from pytest_gpushare.gpu.devices import GpuFacts
from pytest_gpushare.gpu.sampler import Live
from pytest_gpushare.hosts.answers import Foreign, models_of
from pytest_gpushare.hosts.connection import HostConnection
from pytest_gpushare.ollama.models import LoadedModel, OllamaFacts
from pytest_gpushare.ollama.monitor import Monitor, MonitoredServer
from pytest_gpushare.ollama.reservation import devices_of_ollama, statements
from pytest_gpushare.planning.plan import Plan
from pytest_gpushare.session.needs_store import ModelSizes
from pytest_gpushare.session.services import monitored_server
from pytest_gpushare.session.workers import Workers

_MOST_MODELS = 1000
_numbers = itertools.count(1)


class HostQuestion:
    """`GET /api/ps`, asked on a host; as `ollama.monitor.Question`."""

    def __init__(self, connection: HostConnection, patience: float) -> None:
        self.number = next(_numbers)
        self.models: tuple[LoadedModel, ...] | None = None
        self.problem = f"no answer within {patience:g} s"
        self.is_refused = False
        self._deadline = time.monotonic() + patience
        self._answered = threading.Event()
        connection.say(f"models {self.number}")

    @property
    def is_gone(self) -> bool:
        """Whether nothing will come any more."""
        return self._answered.is_set() or time.monotonic() >= self._deadline

    @property
    def is_over(self) -> bool:
        """The same: nothing of it runs here."""
        return self.is_gone

    def wait(self, seconds: float) -> None:
        """Wait for the answer, at most for so many seconds."""
        self._answered.wait(max(0.0, seconds))

    def hang_up(self) -> None:
        """Its answer is not wanted any more."""
        self._answered.set()

    def take(self, message: Mapping[str, Any]) -> None:
        """The host's answer. Raises `ValueError` for one that makes no sense."""
        if self._answered.is_set():
            return
        found = Foreign(message)
        self.is_refused = found.flag("refused")
        if found.is_null("models"):
            self.problem = found.text("problem")
        else:
            self.models = models_of(found.list("models", _MOST_MODELS))
        self._answered.set()


class HostMonitor(Monitor):
    """Follows the Ollama of one host."""

    def __init__(self, run: HostOllama, connection: HostConnection, live: Live) -> None:
        known = devices_of_ollama(run.settings.ollama_gpu, run.gpus)
        address = run.ollama.server
        super().__init__(address, lambda: monitored_server(run, live, known))  # type: ignore[arg-type]
        self._connection = connection
        self._there: HostQuestion | None = None

    def _ask(self, patience: float) -> Any:
        self.asked += 1
        self._there = self._question = HostQuestion(self._connection, patience)  # type: ignore[assignment]
        return self._there

    def take(self, message: Mapping[str, Any]) -> None:
        """An answer has arrived. Raises `ValueError` for one that makes no sense."""
        question = self._there
        if question is not None and message.get("number") == question.number:
            question.take(message)


class HostOllama:
    """One host of a run, as its monitor sees it: `session.services.MonitoredRun`."""

    def __init__(
        self,
        settings: Settings,
        gpus: GpuFacts,
        ollama: OllamaFacts,
        plan: Plan,
        live: Live,
        attribution: Attribution,
    ) -> None:
        self.settings, self.gpus, self.ollama, self.plan = settings, gpus, ollama, plan
        self.live: Live | None = live
        self.attribution = attribution
        self.workers: Workers
        self.record: Record
        self.model_sizes = ModelSizes(settings, gpus, ollama)
        self.monitor: HostMonitor | None = None

    def statements(self, loaded: Sequence[LoadedModel] | None = None) -> tuple[Statement, ...]:
        """What its Ollama says that it holds: of these models, or of those in its last answer."""
        if loaded is None and self.monitor is not None:
            loaded = self.monitor.models
        answer = self.ollama
        if loaded is not None:
            answer = answer._replace(answered=True, models=tuple(loaded))
        return statements(devices_of_ollama(self.settings.ollama_gpu, self.gpus), answer)

    def follow(
        self, workers: Workers, record: Record, connection: HostConnection
    ) -> HostMonitor | None:
        """The monitor of this run; None where no server is asked there, or none that holds VRAM."""
        self.workers, self.record = workers, record
        asked = self.ollama.asked and self.ollama.on_this_host
        known = devices_of_ollama(self.settings.ollama_gpu, self.gpus)
        if not asked or known == () or self.live is None:
            return None
        self.monitor = HostMonitor(self, connection, self.live)
        return self.monitor

    def server(self) -> MonitoredServer | None:
        """What is known of it so far."""
        return self.monitor.server if self.monitor is not None else None
