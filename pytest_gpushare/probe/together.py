"""Both probes at the same time, each with a limit; a probe that hangs is left behind.

Daemon threads, because neither a DNS look-up nor a call into a stuck driver can be cancelled.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from pytest_gpushare.probe.address import Address, parse_address
from pytest_gpushare.probe.facts import GpuFacts, OllamaFacts
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
        return Probes(simulated(simulate), _ask_ollama(settings, environment), _nothing)
    reading = _NvmlReading(environment)
    ollama = _ask_ollama(settings, environment)
    return Probes(reading.finish(), ollama, reading.close, reading.nvml)


def address_of(settings: Settings, environment: Mapping[str, str]) -> Address:
    """Where Ollama is called: the setting, else OLLAMA_HOST, else its default."""
    return parse_address(settings.ollama_host or environment.get("OLLAMA_HOST", ""))


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
        return replace(facts, absence=f"{facts.absence}; {hidden}")

    def close(self) -> None:
        _Answer("nvml-close", self.nvml.close).wait(time.monotonic() + _CLOSE_TIMEOUT)


def _ask_ollama(settings: Settings, environment: Mapping[str, str]) -> OllamaFacts:
    if not settings.enable_ollama_detection:
        return OllamaFacts()
    # Imported in this thread, so that its cost does not count against Ollama's time limit.
    from pytest_gpushare.probe.ollama import ask, unanswered

    address, limit = address_of(settings, environment), float(settings.ollama_timeout)
    if address.scheme == "https":
        try:
            import pytest_gpushare.probe.secure  # noqa: F401 - as above
        except Exception as error:
            return unanswered(address, f"cannot be asked: no httpx for https ({error})"[:200])
    connections: list[Connection] = []
    answer = _Answer("ollama", lambda: ask(address, limit, connections.append))
    facts = answer.wait(time.monotonic() + limit + _GRACE)
    if facts is not None:
        return facts
    for connection in connections:
        with contextlib.suppress(Exception):
            connection.close()
    return unanswered(address, f"no answer within {limit:g} s")


def _nothing() -> None:
    pass
