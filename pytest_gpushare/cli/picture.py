"""What `watch` shows: devices, sessions and Ollama at one moment, gathered without waiting long."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pytest_gpushare.cli.bounded import bounded
from pytest_gpushare.probe.facts import Device, GpuFacts, GpuProcess, Memory, OllamaFacts
from pytest_gpushare.probe.nvml import Nvml
from pytest_gpushare.run.alive import ancestors, identity, sees_every_process
from pytest_gpushare.run.live import LiveVram
from pytest_gpushare.run.presence import PresentSession, sessions
from pytest_gpushare.settings.values import Settings

HISTORY = 60
"""Pictures that a sparkline is made of."""

OLLAMA_EVERY = 2.0
"""Seconds between two rounds of questions to Ollama, at least; each round is two GETs."""

_OPEN_PATIENCE = 10.0


@dataclass(frozen=True)
class SeenDevice:
    """A device at one moment; sizes in bytes, None where nobody can tell."""

    device: Device
    memory: Memory | None
    ollama: int | None
    tests: int | None
    others: int | None
    history: tuple[float, ...]
    """The part in use, 0 to 1, of the last pictures, the oldest first."""


@dataclass(frozen=True)
class Picture:
    """Everything at one moment."""

    at: float
    """Seconds since the epoch."""
    devices: tuple[SeenDevice, ...]
    absence: str
    driver: str | None
    problems: tuple[str, ...]
    sessions: tuple[PresentSession, ...]
    held: Mapping[int, int]
    """PID of a worker -> bytes of VRAM that it and what it started hold; left out where unknown."""
    ollama: OllamaFacts


class Watcher:
    """Takes pictures; NVML is opened once and held."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._nvml = Nvml()
        facts = bounded(self._open, _OPEN_PATIENCE)
        self._facts = facts or GpuFacts(absence=f"NVML did not answer within {_OPEN_PATIENCE:g} s")
        self._live = LiveVram(self._nvml) if facts and facts.all_devices else None
        self._history: dict[str, deque[float]] = {}
        self._ollama = OllamaFacts()
        self._asked_at = float("-inf")
        self._asking: threading.Thread | None = None

    def close(self) -> None:
        """Let go of NVML."""
        if self._live is not None:
            self._live.close()
        bounded(self._nvml.close, 1.0)

    def take(self, max_age: float) -> Picture:
        """A picture; what it shows of VRAM is at most `max_age` seconds old unless NVML is slow."""
        self._ask_ollama()
        running = tuple(sessions())
        memory: Mapping[str, Memory] = {}
        processes: Mapping[str, tuple[GpuProcess, ...] | None] = {}
        if self._live is not None:
            memory = self._live.memory(min(max_age, 0.5)).devices
            processes = self._live.processes(max(max_age, 1.0)).devices
        owners = {pid: _worker_of(pid, running) for pid in _pids(processes)}
        return Picture(
            at=time.time(),
            devices=tuple(
                self._seen(device, memory.get(device.uuid), processes.get(device.uuid), owners)
                for device in self._facts.all_devices
            ),
            absence="" if self._facts.all_devices else self._facts.absence,
            driver=self._facts.driver,
            problems=self._facts.problems,
            sessions=running,
            held=_held(processes, owners, running),
            ollama=self._ollama,
        )

    def _open(self) -> GpuFacts:
        self._nvml.open()
        # All devices of the host, also those that CUDA_VISIBLE_DEVICES hides from us.
        return self._nvml.read(None, None)

    def _seen(
        self,
        device: Device,
        memory: Memory | None,
        processes: tuple[GpuProcess, ...] | None,
        owners: Mapping[int, int | None],
    ) -> SeenDevice:
        history = self._history.setdefault(device.uuid, deque(maxlen=HISTORY))
        if memory is not None and memory.total:
            history.append(memory.used / memory.total)
        ollama = tests = others = None
        if processes is not None and _are_told(processes):
            ollama = sum(p.used or 0 for p in processes if p.is_ollama)
            tests = sum(p.used or 0 for p in processes if owners.get(p.pid) is not None)
            if memory is not None:
                others = max(0, memory.used - ollama - tests)
        return SeenDevice(device, memory, ollama, tests, others, tuple(history))

    def _ask_ollama(self) -> None:
        """Ask in the background, at most every two seconds; the first time wait for the answer."""
        if not self._settings.enable_ollama_detection:
            return
        busy = self._asking is not None and self._asking.is_alive()
        if busy or time.monotonic() - self._asked_at < OLLAMA_EVERY:
            return
        first = self._asking is None
        self._asked_at = time.monotonic()
        self._asking = threading.Thread(target=self._ask, name="gpu-share-ollama", daemon=True)
        self._asking.start()
        if first:
            self._asking.join(float(self._settings.ollama_timeout) + 0.5)

    def _ask(self) -> None:
        from pytest_gpushare.probe.ollama import ask
        from pytest_gpushare.probe.together import ask_ollama

        known = self._ollama
        if known.answered and known.server is not None:
            again = ask(known.server, float(self._settings.ollama_timeout))
            self._ollama = again._replace(server=known.server, found_by=known.found_by)
        else:
            # Every address that may be Ollama's. Models by name would take more than GETs.
            self._ollama = ask_ollama(replace(self._settings, ollama_models=()), os.environ)


def _pids(processes: Mapping[str, tuple[GpuProcess, ...] | None]) -> set[int]:
    return {process.pid for found in processes.values() for process in found or ()}


def _worker_of(pid: int, running: tuple[PresentSession, ...]) -> int | None:
    """PID of the worker that is this process, or that has started it."""
    workers = {worker.pid for session in running for worker in session.workers}
    return next((number for number in ancestors(pid) if number in workers), None)


def _are_told(processes: Sequence[GpuProcess]) -> bool:
    """Whether a list means what it says: bytes are told, and the PIDs are this system's.

    A container may see the host's PIDs, or none at all; then nothing is known of anybody.
    """
    if not processes:
        return sees_every_process()
    return all(p.used is not None and identity(p.pid) is not None for p in processes)


def _held(
    processes: Mapping[str, tuple[GpuProcess, ...] | None],
    owners: Mapping[int, int | None],
    running: Sequence[PresentSession],
) -> dict[int, int]:
    held: dict[int, int] = {}
    for uuid, found in processes.items():
        if found is None or not _are_told(found):
            continue
        for worker in (worker for session in running for worker in session.workers):
            own = [p.used or 0 for p in found if owners.get(p.pid) == worker.pid]
            if own or worker.device == uuid:
                held[worker.pid] = held.get(worker.pid, 0) + sum(own)
    return held
