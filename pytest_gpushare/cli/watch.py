"""`pytest-gpushare watch`: snapshots of devices, sessions and Ollama, until Ctrl-C.

A snapshot is shown as rows in a terminal, as lines in a pipe, or as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from pytest_gpushare.cli.plan_command import pytest_view, settings_of
from pytest_gpushare.cli.terminal import OK, Piece, Row, screen, show, write_lines
from pytest_gpushare.config.settings import Settings
from pytest_gpushare.gpu.attribution import Attribution, DeviceUsage, ProcessSplit
from pytest_gpushare.gpu.devices import Device, GpuFacts, GpuProcess, Memory
from pytest_gpushare.gpu.host import is_alive, sees_every_process
from pytest_gpushare.gpu.readings import LiveVram
from pytest_gpushare.host_probe import host_probe
from pytest_gpushare.leases.ledger import directory_of
from pytest_gpushare.leases.records import SessionWorker
from pytest_gpushare.neighbours import (
    Answers,
    answer_of_ollama,
    ask_again,
    line_of,
    other_servers,
    statements_of,
)
from pytest_gpushare.ollama.models import OLLAMA, OllamaFacts, described
from pytest_gpushare.report.document import PLAN_SCHEMA, ollama_document, servers_document
from pytest_gpushare.session.session_record import RunningSession, sessions
from pytest_gpushare.text import sparkline, wrapped
from pytest_gpushare.timed import call_within
from pytest_gpushare.units import format_gb, plural

HISTORY = 60
"""Snapshots that a sparkline shows."""

SERVERS_EVERY = 2.0
"""The least number of seconds between two rounds of requests to servers; Ollama gets two GETs."""

_LEAST_AGE = 0.9
"""Seconds for which readings are shown again: process lists are asked for once a second at most."""

_OPEN_PATIENCE = 10.0

_IMPORT_PATIENCE = 5.0
"""Seconds that the import of Ollama's client may take on a busy machine."""


def watch(options: argparse.Namespace) -> int:
    """Show snapshots until Ctrl-C. Returns the exit code; Ctrl-C is no error."""
    with (
        _terminable(),
        contextlib.suppress(KeyboardInterrupt),
        # For Ollama's address; the defaults where the project's settings cannot be read.
        closing(Watcher(settings_of(pytest_view(()))[0])) as watcher,
        _output(options) as show_snapshot,
    ):
        due = time.monotonic()
        while True:
            show_snapshot(watcher.snapshot(options.interval / 2))
            if options.once:
                break
            due = max(due + options.interval, time.monotonic() + 0.05)
            time.sleep(due - time.monotonic())
    return OK


@contextmanager
def _output(options: argparse.Namespace) -> Iterator[Callable[[Snapshot], None]]:
    """How a snapshot is shown: as JSON, redrawn in a terminal, or as lines."""
    if options.json:
        yield lambda snapshot: write_lines([json.dumps(document(snapshot))])
    elif not sys.stdout.isatty():
        yield lambda snapshot: write_lines(lines(snapshot))
    elif options.once:
        yield lambda snapshot: show(rows(snapshot, 80))
    else:
        with screen() as drawn:
            if drawn is None:
                # The terminal cannot be redrawn, as with TERM=dumb.
                yield lambda snapshot: write_lines(lines(snapshot))
            else:
                yield lambda snapshot: drawn(lambda width: rows(snapshot, width))


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, so that the terminal is restored."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class SeenDevice:
    """A device at one moment; sizes in bytes, None where unknown."""

    device: Device
    memory: Memory | None
    ollama: int | None
    tests: int | None
    others: int | None
    history: tuple[float, ...]
    """The part in use, 0 to 1, in the last snapshots, the oldest first."""
    servers: Mapping[str, int] = field(default_factory=dict)
    """What other servers than Ollama hold, by name."""

    @property
    def is_attributed(self) -> bool:
        """Whether it is known who holds all of it."""
        return None not in (self.ollama, self.tests, self.others)


@dataclass(frozen=True)
class Snapshot:
    """Devices, sessions and Ollama at one moment."""

    at: float
    """Seconds since the epoch."""
    devices: tuple[SeenDevice, ...]
    absence: str
    driver: str | None
    problems: tuple[str, ...]
    sessions: tuple[RunningSession, ...]
    held: Mapping[int, int]
    """PID of a worker -> bytes held by it and its descendants; absent where unknown."""
    ollama: OllamaFacts
    servers: Answers = field(default_factory=dict)
    """The answers of other servers, by name."""


class Watcher:
    """Takes snapshots; the driver's library is opened once and stays open."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._probe = host_probe()
        self._attribution = Attribution()
        facts = call_within(_OPEN_PATIENCE, self._open)
        self._facts = facts or GpuFacts(
            absence=f"{self._probe.library} did not answer within {_OPEN_PATIENCE:g} s"
        )
        self._live = LiveVram(self._probe) if facts and facts.all_devices else None
        self._history: dict[str, deque[float]] = {}
        self._answers: Answers = {}
        self._asked_at = float("-inf")
        self._asking: threading.Thread | None = None

    def close(self) -> None:
        """Close the driver's library."""
        if self._live is not None:
            self._live.close()
        call_within(1.0, self._probe.close)

    def snapshot(self, max_age: float) -> Snapshot:
        """A snapshot; its VRAM is at most `max_age` seconds old unless the driver is slow."""
        self._ask_servers()
        running = tuple(sessions(directory_of(self._settings.leases)))
        workers = {w.pid: str(w.pid) for session in running for w in session.workers}
        memory: Mapping[str, Memory] = {}
        splits: dict[str, ProcessSplit | None] = {}
        if self._live is not None:
            # Of one age, and read one after the other: the parts of a bar are of one moment.
            age = max(max_age, _LEAST_AGE)
            for uuid, found in self._live.processes(age).devices.items():
                known = found if _is_trustworthy(found or ()) else None
                splits[uuid] = self._attribution.split(known, workers)
            memory = self._live.memory(age).devices
        usage = self._attribution.usage(memory, splits, statements_of(self._answers, {}))
        return Snapshot(
            at=time.time(),
            devices=tuple(
                self._seen(device, memory.get(device.uuid), usage.get(device.uuid))
                for device in self._facts.all_devices
            ),
            absence="" if self._facts.all_devices else self._facts.absence,
            driver=self._facts.driver,
            problems=self._facts.problems,
            sessions=running,
            held=_held(usage, running),
            ollama=answer_of_ollama(self._answers),
            servers=other_servers(self._answers),
        )

    def _open(self) -> GpuFacts:
        self._probe.open()
        # All devices of the host, those included that the environment hides.
        return self._probe.read({})

    def _seen(self, device: Device, memory: Memory | None, usage: DeviceUsage | None) -> SeenDevice:
        history = self._history.setdefault(device.uuid, deque(maxlen=HISTORY))
        if memory is not None and memory.total:
            history.append(memory.used / memory.total)
        ollama = tests = others = None
        servers: Mapping[str, int] = {}
        if usage is not None and (usage.workers is not None or usage.neighbours):
            ollama, tests, others = usage.of(OLLAMA), usage.tests, usage.remainder
            servers = {name: size for name, size in usage.neighbours.items() if name != OLLAMA}
        return SeenDevice(device, memory, ollama, tests, others, tuple(history), servers)

    def _ask_servers(self) -> None:
        """Ask them in the background, at most every two seconds; only the first call waits."""
        busy = self._asking is not None and self._asking.is_alive()
        if busy or time.monotonic() - self._asked_at < SERVERS_EVERY:
            return
        first = self._asking is None
        self._asking = threading.Thread(target=self._ask, name="gpu-share-servers", daemon=True)
        self._asking.start()
        if first:
            # The questions have a limit of their own.
            self._asking.join(float(self._settings.ollama_timeout) + _IMPORT_PATIENCE)

    def _ask(self) -> None:
        try:
            self._answers = ask_again(self._settings, os.environ, self._answers)
        finally:
            # Counted from the end: the first round also imports the client.
            self._asked_at = time.monotonic()


def _is_trustworthy(processes: Sequence[GpuProcess]) -> bool:
    """Whether a process list can be trusted: sizes are given, and the PIDs are this system's.

    A container may see the host's PIDs, or none at all; then no share is known.
    """
    if not processes:
        return sees_every_process()
    return all(p.used is not None and is_alive(p.pid) for p in processes)


def _held(usage: Mapping[str, DeviceUsage], running: Sequence[RunningSession]) -> dict[int, int]:
    held: dict[int, int] = {}
    for uuid, found in usage.items():
        if found.workers is None:
            continue
        for worker in (worker for session in running for worker in session.workers):
            own = found.workers.get(str(worker.pid))
            if own is not None or worker.device == uuid:
                held[worker.pid] = held.get(worker.pid, 0) + (own or 0)
    return held


_SIGNS = "█▓▒░"
"""The parts of a bar: Ollama and other servers, tests, others, free."""
_STYLES = ("magenta", "green", "blue", "dim")


def rows(snapshot: Snapshot, width: int) -> Iterator[Row]:
    """The snapshot for a terminal of this width."""
    driver = f", driver {snapshot.driver}" if snapshot.driver else ""
    yield [Piece("pytest-gpushare watch", "bold"), Piece(f"  {_clock(snapshot.at)}{driver}", "dim")]
    if snapshot.absence:
        yield from _broken(f"no GPU: {snapshot.absence}", width, "yellow")
    for seen in snapshot.devices:
        yield [Piece("")]
        yield [Piece(f"{seen.device.label} {seen.device.name}", "bold")]
        yield _bar(seen, width)
        yield [Piece("  "), *_legend(seen)]
    for problem in snapshot.problems:
        yield from _broken(problem, width, "yellow")
    yield [Piece("")]
    if not snapshot.sessions:
        yield [Piece("no session runs under the plugin")]
    for session in snapshot.sessions:
        yield from _broken(_session(session, snapshot.at), width, "bold")
        for worker in session.workers:
            yield from _broken(f"  {_worker(worker, snapshot)}", width)
    yield [Piece("")]
    for text, style in _servers(snapshot):
        yield from _broken(text, width, style)


def _broken(text: str, width: int, style: str = "") -> Iterator[Row]:
    for part in wrapped(text, width, 4):
        yield [Piece(part, style)]


def lines(snapshot: Snapshot) -> Iterator[str]:
    """The snapshot for a pipe or a file: one fact per line, with the time in front."""
    for text in _facts(snapshot):
        yield f"{_clock(snapshot.at)} {text}"


def document(snapshot: Snapshot) -> dict[str, Any]:
    """The snapshot as a document; sizes in bytes, null where unknown."""
    return {
        "schema": PLAN_SCHEMA,
        "at": datetime.fromtimestamp(snapshot.at, timezone.utc).isoformat(timespec="milliseconds"),
        "driver": snapshot.driver,
        "absence": snapshot.absence,
        "devices": [
            {
                "uuid": seen.device.uuid,
                "name": seen.device.name,
                "index": seen.device.index,
                "total_bytes": seen.memory.total if seen.memory else None,
                "used_bytes": seen.memory.used if seen.memory else None,
                "free_bytes": seen.memory.free if seen.memory else None,
                "ollama_bytes": seen.ollama,
                "tests_bytes": seen.tests,
                "others_bytes": seen.others,
                **({"servers_bytes": dict(seen.servers)} if seen.servers else {}),
            }
            for seen in snapshot.devices
        ],
        "sessions": [_session_document(session, snapshot) for session in snapshot.sessions],
        "ollama": ollama_document(snapshot.ollama),
        **servers_document(snapshot.servers),
        "problems": list(snapshot.problems),
    }


def _facts(snapshot: Snapshot) -> Iterator[str]:
    if snapshot.absence:
        yield f"no GPU: {snapshot.absence}"
    for seen in snapshot.devices:
        yield f"{seen.device.label}: {_memory(seen)}; {_holders(seen)}"
    yield from snapshot.problems
    if not snapshot.sessions:
        yield "no session"
    for session in snapshot.sessions:
        yield _session(session, snapshot.at)
        yield from (f"{_worker(w, snapshot)} (session {session.pid})" for w in session.workers)
    yield from (text.strip() for text, _ in _servers(snapshot))


def _bar(seen: SeenDevice, width: int) -> Row:
    memory = seen.memory
    if memory is None or not memory.total:
        return [Piece("  no reading: the device does not answer", "yellow")]
    cells = 24 if width >= 80 else 12
    text = f"  {_memory(seen)}  "
    room = max(0, width - 2 - cells - len(text))
    # Where the holders are unknown, all used VRAM counts as others'.
    servers, tests = (seen.ollama or 0) + sum(seen.servers.values()), seen.tests or 0
    shares = _shares((servers, tests, memory.used - servers - tests), memory.total, cells)
    signs = [sign * count for sign, count in zip(_SIGNS, shares, strict=True)]
    bar = map(Piece, signs, _STYLES)
    spark = sparkline(seen.history[-room:] if room else ())
    return [Piece("  "), *bar, Piece(text), Piece(spark, "cyan")]


def _shares(parts: Sequence[int], total: int, cells: int) -> list[int]:
    """Cells for each part and for the free rest, rounded so that they add up."""
    ends, sum_ = [], 0
    for part in parts:
        sum_ += max(0, part)
        ends.append(min(cells, round(sum_ * cells / total)))
    return [end - start for start, end in zip([0, *ends], [*ends, cells], strict=True)]


def _legend(seen: SeenDevice) -> Row:
    if not seen.is_attributed:
        return [Piece(_holders(seen), "dim")]
    words = _holders(seen).split(", ")
    row: list[Piece] = []
    for sign, style, word in zip(_SIGNS, _STYLES, words, strict=False):
        row += [Piece(f"{sign} ", style), Piece(f"{word}  ")]
    return row


def _memory(seen: SeenDevice) -> str:
    memory = seen.memory
    if memory is None:
        return "no reading"
    return (
        f"{format_gb(memory.used)} of {format_gb(memory.total)} used, {format_gb(memory.free)} free"
    )


def _holders(seen: SeenDevice) -> str:
    held = {OLLAMA: seen.ollama or 0, **seen.servers}
    if not seen.is_attributed:
        known = [f"{name} {format_gb(size)}" for name, size in held.items() if size]
        return f"{' + '.join(known)}, others unknown" if known else "holders unknown"
    servers = " + ".join(f"{name} {format_gb(size)}" for name, size in held.items())
    return f"{servers}, tests {format_gb(seen.tests or 0)}, others {format_gb(seen.others or 0)}"


def _session(session: RunningSession, now: float) -> str:
    age = max(0, int(now - session.began))
    since = f"{age // 3600}:{age % 3600 // 60:02}:{age % 60:02}"
    what = plural(len(session.workers), "worker") if session.workers else "no worker yet"
    owner = f" of {session.owner}" if session.owner else ""
    parts = [what, since]
    if session.is_waiting:
        parts.append("waits for VRAM")
    if session.leases:
        parts.append(f"leases {format_gb(sum(session.leases.values()))}")
    if session.total:
        parts.append(f"{session.done:,} of {session.total:,} tests done")
    return f"session {session.pid}{owner} in {_home(session.root)}: {', '.join(parts)}"


def _worker(worker: SessionWorker, snapshot: Snapshot) -> str:
    if worker.role != "gpu":
        return f"{worker.id}: CPU, no GPU"
    label = next(
        (s.device.label for s in snapshot.devices if s.device.uuid == worker.device),
        worker.device or "no GPU",
    )
    held = snapshot.held.get(worker.pid)
    holds = "unknown" if held is None else format_gb(held)
    over = ", over its slot" if worker.is_bounded and (held or 0) > worker.slot else ""
    return f"{worker.id}: {label}, {holds} of {format_gb(worker.slot)}{over}, PID {worker.pid}"


def _servers(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    """The lines about all servers, each with its style."""
    yield from _ollama(snapshot.ollama)
    for name, answer in snapshot.servers.items():
        yield line_of(name, answer), "bold" if answer.answered else ""


def _ollama(ollama: OllamaFacts) -> Iterator[tuple[str, str]]:
    """The lines about it, each with its style."""
    if not ollama.asked:
        yield "Ollama is not asked", ""
        return
    who = f"Ollama {ollama.version}" if ollama.version else "Ollama"
    if not ollama.answered:
        yield f"{who} at {ollama.address}: {ollama.problem}", ""
        return
    away = "" if ollama.on_this_host else ", another machine"
    none = "" if ollama.models else ": no model in VRAM"
    yield f"{who} at {ollama.address}{away}{none}", "bold"
    for model in ollama.models:
        yield f"  {described(model)}", "bold red" if model.is_spilled else ""


def _session_document(session: RunningSession, snapshot: Snapshot) -> dict[str, Any]:
    return {
        "pid": session.pid,
        "root": session.root,
        "age_s": round(max(0.0, snapshot.at - session.began), 3),
        "owner": session.owner,
        "leased_bytes": dict(session.leases),
        "waiting": session.is_waiting,
        "tests_done": session.done,
        "tests": session.total or None,
        "workers": [
            {
                "id": worker.id,
                "pid": worker.pid,
                "role": worker.role,
                "device": worker.device,
                "slot_bytes": worker.slot or None,
                "held_bytes": snapshot.held.get(worker.pid),
            }
            for worker in session.workers
        ],
    }


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def _home(path: str) -> str:
    """The path with `~` for the home directory."""
    home = (os.environ.get("HOME") or os.environ.get("USERPROFILE") or "").rstrip("/\\")
    return f"~{path[len(home) :]}" if home and path.startswith(home + os.sep) else path
