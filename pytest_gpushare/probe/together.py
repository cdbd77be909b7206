"""Both probes at the same time, each with a limit; a probe that hangs is left behind.

Daemon threads, because neither a DNS look-up nor a call into a stuck driver can be cancelled.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from pytest_gpushare.probe.address import Address
from pytest_gpushare.probe.candidates import Candidate, candidates
from pytest_gpushare.probe.facts import GpuFacts, ModelFacts, OllamaFacts
from pytest_gpushare.probe.simulated import simulated
from pytest_gpushare.probe.visibility import VARIABLE
from pytest_gpushare.settings.values import Settings

if TYPE_CHECKING:
    from pytest_gpushare.probe.exchange import Connection
    from pytest_gpushare.probe.nvml import Nvml

NVML_TIMEOUT = 10.0
"""Seconds that NVML may take to open and to tell its devices; 1.5 s has been seen."""

_CLOSE_TIMEOUT = 1.0
"""Seconds that NVML may take to shut down; the end of the process does the same."""

_GRACE = 0.02
"""Seconds for a probe that ran into its own limit to say so."""

T = TypeVar("T")


class _Answer(Generic[T]):
    """A call that runs in a daemon thread."""

    def __init__(self, name: str, call: Callable[[], T]) -> None:
        self._call = call
        self._value: T | None = None
        self._thread = threading.Thread(target=self._run, name=f"gpu-share-{name}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # A probe that was left behind may fail when its library is closed under it; nobody
        # waits for it any more, and pytest would report an exception in a thread.
        with contextlib.suppress(Exception):
            self._value = self._call()

    def wait(self, until: float) -> T | None:
        """The answer, or None where there is none at `until` (on the monotonic clock)."""
        self._thread.join(max(0.0, until - time.monotonic()))
        return self._value


class Probes(NamedTuple):
    """What both probes found, and the library that is held open for the rest of the run."""

    gpus: GpuFacts
    ollama: OllamaFacts
    close: Callable[[], None]
    """Releases NVML; harmless when called twice."""
    nvml: Nvml | None = None
    """The open library, for readings during the run; None under a what-if."""


def probe(
    settings: Settings,
    simulate: tuple[str, ...] = (),
    environment: Mapping[str, str] = os.environ,
) -> Probes:
    """Ask NVML (or the what-if) and Ollama at the same time; `environment` is the user's.

    Raises `SettingsError` for a what-if that cannot be understood; nothing else.
    """
    if simulate:
        return Probes(simulated(simulate), ask_ollama(settings, environment), _nothing)
    reading = _NvmlReading(environment)
    ollama = ask_ollama(settings, environment)
    return Probes(reading.finish(), ollama, reading.close, reading.nvml)


class _NvmlReading:
    """NVML being opened and read in the background."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        from pytest_gpushare.probe.nvml import Nvml

        self._environment = environment
        self._visible = environment.get(VARIABLE), environment.get("CUDA_DEVICE_ORDER")
        self.nvml = Nvml()
        self._until = time.monotonic() + NVML_TIMEOUT
        self._answer = _Answer("nvml", self._read)

    def _read(self) -> GpuFacts:
        from pytest_gpushare.probe.nvml import reason

        try:
            self.nvml.open()
            return self.nvml.read(*self._visible)
        except Exception as error:
            # Or it would be told as a time-out, which it is not.
            return GpuFacts(absence=reason(error))

    def finish(self) -> GpuFacts:
        facts = self._answer.wait(self._until)
        facts = facts or GpuFacts(absence=f"NVML did not answer within {NVML_TIMEOUT:g} s")
        given = self._environment.get("NVIDIA_VISIBLE_DEVICES")
        if facts.all_devices or given not in ("void", "none"):
            return facts
        hidden = f"NVIDIA_VISIBLE_DEVICES={given} gives this container none: start it with --gpus"
        return facts._replace(absence=f"{facts.absence}; {hidden}")

    def close(self) -> None:
        _Answer("nvml-close", self.nvml.close).wait(time.monotonic() + _CLOSE_TIMEOUT)


def ask_ollama(settings: Settings, environment: Mapping[str, str]) -> OllamaFacts:
    """Every address that may be Ollama's is asked at once; the best that answers is taken.

    All its questions together have the one time limit.
    """
    if not settings.enable_ollama_detection:
        return OllamaFacts()
    limit = float(settings.ollama_timeout)
    places = candidates(settings.ollama_host, environment)
    # Imported in this thread, so that its cost does not count against Ollama's time limit.
    from pytest_gpushare.probe.ollama import ask

    for place in places:
        _prepare(place.address)
    until = time.monotonic() + limit
    asked = [_OllamaAsking(place, until, partial(ask, place.address, limit)) for place in places]
    facts = []
    for asking in asked:
        facts.append(asking.finish(limit))
        if facts[-1].answered:
            break
    for asking in asked:
        asking.hang_up()
    found = facts[-1] if facts[-1].answered else _nobody(facts)
    if found.answered and settings.ollama_models:
        place = places[len(facts) - 1]
        return found._replace(relied_on=_ask_models(place.address, settings, until))
    return found


def _nobody(facts: Sequence[OllamaFacts]) -> OllamaFacts:
    """None of the addresses gave an answer: what is told of them together."""
    if len(facts) == 1:
        return facts[0]
    reachable = [each for each in facts if each.reachable]
    if reachable:
        return reachable[0]
    return facts[0]._replace(
        address=", ".join(each.address for each in facts),
        problem="; ".join(dict.fromkeys(each.problem for each in facts)),
        found_by="",
    )


class _OllamaAsking:
    """One address being asked in the background."""

    def __init__(self, place: Candidate, until: float, ask: Callable[[Any], OllamaFacts]) -> None:
        self._place, self._until = place, until
        self._connections: list[Connection] = []
        self._answer = _Answer("ollama", lambda: ask(self._connections.append))

    def finish(self, limit: float) -> OllamaFacts:
        """What it said in time, or that it said nothing."""
        from pytest_gpushare.probe.ollama import unanswered

        facts = self._answer.wait(self._until + _GRACE)
        facts = facts or unanswered(self._place.address, f"no answer within {limit:g} s")
        return facts._replace(found_by=self._place.found_by, server=self._place.address)

    def hang_up(self) -> None:
        """End what is still under way: a server that drips would keep its thread for ever."""
        _hang_up(self._connections)


def _ask_models(address: Address, settings: Settings, until: float) -> tuple[ModelFacts, ...]:
    from pytest_gpushare.probe.models import ask_models

    names, connections = settings.ollama_models, list[Any]()
    answer = _Answer("ollama", lambda: ask_models(address, names, until, connections.append))
    models = answer.wait(until + _GRACE)
    _hang_up(connections)
    problem = "no answer in time: raise gpu_share_ollama_timeout_s"
    return models or tuple(ModelFacts(name, problem=problem) for name in names)


def _prepare(address: Address) -> None:
    """Import what a server over https takes; where that fails, asking it will tell."""
    if address.scheme == "https":
        with contextlib.suppress(Exception):
            import pytest_gpushare.probe.secure  # noqa: F401 - for its cost


def _hang_up(connections: Sequence[Connection]) -> None:
    for connection in connections:
        with contextlib.suppress(Exception):
            connection.close()


def _nothing() -> None:
    pass
