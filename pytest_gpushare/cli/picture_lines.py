"""A picture of `watch` in words: rows for a terminal, lines for a pipe, a document for programs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from typing import Any

from pytest_gpushare.cli.document import SCHEMA, ollama_document
from pytest_gpushare.cli.output import Piece, Row
from pytest_gpushare.cli.picture import Picture, SeenDevice
from pytest_gpushare.plan.placed import placed
from pytest_gpushare.probe.facts import OllamaFacts
from pytest_gpushare.run.presence import PresentSession, PresentWorker
from pytest_gpushare.units import format_gb, plural

_LEVELS, _ASCII_LEVELS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
_SIGNS, _ASCII_SIGNS = "█▓▒░", "OT#."
"""The parts of a bar: Ollama, tests, others, and what is free."""
_STYLES = ("magenta", "green", "blue", "dim")


def rows(picture: Picture, width: int, *, unicode: bool = True) -> Iterator[Row]:
    """The picture for a terminal of this width."""
    driver = f", driver {picture.driver}" if picture.driver else ""
    yield [Piece("pytest-gpushare watch", "bold"), Piece(f"  {_clock(picture.at)}{driver}", "dim")]
    if picture.absence:
        yield [Piece(f"no GPU: {picture.absence}", "yellow")]
    for seen in picture.devices:
        yield [Piece("")]
        yield [Piece(f"{seen.device.label} {seen.device.name}", "bold")]
        yield _bar(seen, width, unicode=unicode)
        yield [Piece("  "), *_legend(seen, unicode=unicode)]
    for problem in picture.problems:
        yield [Piece(problem, "yellow")]
    yield [Piece("")]
    if not picture.sessions:
        yield [Piece("no session of yours runs under the plugin")]
    for session in picture.sessions:
        yield [Piece(_session(session, picture.at), "bold")]
        for worker in session.workers:
            yield [Piece(f"  {_worker(worker, picture)}")]
    yield [Piece("")]
    yield from _ollama_rows(picture.ollama)


def lines(picture: Picture) -> Iterator[str]:
    """The picture for a pipe or a file: one fact on each line, the time in front."""
    for text in _facts(picture):
        yield f"{_clock(picture.at)} {text}"


def document(picture: Picture) -> dict[str, Any]:
    """The picture for a program; sizes in bytes, unknown is null."""
    return {
        "schema": SCHEMA,
        "at": datetime.fromtimestamp(picture.at, timezone.utc).isoformat(timespec="milliseconds"),
        "driver": picture.driver,
        "absence": picture.absence,
        "devices": [_device_document(seen) for seen in picture.devices],
        "sessions": [_session_document(session, picture) for session in picture.sessions],
        "ollama": ollama_document(picture.ollama),
        "problems": list(picture.problems),
    }


def sparkline(parts: Sequence[float], *, unicode: bool = True) -> str:
    """One sign for each part from 0 to 1."""
    levels = _LEVELS if unicode else _ASCII_LEVELS
    top = len(levels) - 1
    return "".join(levels[min(top, max(0, round(part * top)))] for part in parts)


def _facts(picture: Picture) -> Iterator[str]:
    if picture.absence:
        yield f"no GPU: {picture.absence}"
    for seen in picture.devices:
        yield f"{seen.device.label}: {_memory(seen)}; {_holders(seen)}"
    yield from picture.problems
    if not picture.sessions:
        yield "no session"
    for session in picture.sessions:
        yield _session(session, picture.at)
        yield from (f"{_worker(w, picture)} (session {session.pid})" for w in session.workers)
    yield from (
        "".join(piece.text for piece in row).strip() for row in _ollama_rows(picture.ollama)
    )


def _bar(seen: SeenDevice, width: int, *, unicode: bool) -> Row:
    memory = seen.memory
    if memory is None or not memory.total:
        return [Piece("  no reading: the device does not answer", "yellow")]
    cells = 24 if width >= 80 else 12
    text = f"  {_memory(seen)}  "
    room = max(0, width - 2 - cells - len(text))
    # Who holds it may be unknown: then all that is used is somebody's.
    parts = (
        seen.ollama or 0,
        seen.tests or 0,
        memory.used - (seen.ollama or 0) - (seen.tests or 0),
    )
    signs = _SIGNS if unicode else _ASCII_SIGNS
    bar = [
        Piece(sign * count, style)
        for sign, count, style in zip(
            signs, _shares(parts, memory.total, cells), _STYLES, strict=True
        )
    ]
    spark = sparkline(seen.history[-room:] if room else (), unicode=unicode)
    return [Piece("  "), *bar, Piece(text), Piece(spark, "cyan")]


def _shares(parts: Sequence[int], total: int, cells: int) -> list[int]:
    """Cells for each part and for the rest, rounded at the borders so that they add up."""
    ends, sum_ = [], 0
    for part in parts:
        sum_ += max(0, part)
        ends.append(min(cells, round(sum_ * cells / total)))
    return [end - start for start, end in zip([0, *ends], [*ends, cells], strict=True)]


def _legend(seen: SeenDevice, *, unicode: bool) -> Row:
    if seen.ollama is None:
        return [Piece(_holders(seen), "dim")]
    signs = _SIGNS if unicode else _ASCII_SIGNS
    words = _holders(seen).split(", ")
    row: list[Piece] = []
    for sign, style, word in zip(signs, _STYLES, words, strict=False):
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
    if seen.ollama is None or seen.tests is None or seen.others is None:
        return "who holds it is not told"
    return (
        f"Ollama {format_gb(seen.ollama)}, tests {format_gb(seen.tests)}, "
        f"others {format_gb(seen.others)}"
    )


def _session(session: PresentSession, now: float) -> str:
    age = max(0, int(now - session.began))
    since = f"{age // 3600}:{age % 3600 // 60:02}:{age % 60:02}"
    what = plural(len(session.workers), "worker") if session.workers else "no worker yet"
    return f"session {session.pid} in {_home(session.root)}: {what}, {since}"


def _worker(worker: PresentWorker, picture: Picture) -> str:
    if worker.role != "gpu":
        return f"{worker.id}: CPU, no GPU"
    label = next(
        (s.device.label for s in picture.devices if s.device.uuid == worker.device),
        worker.device or "no GPU",
    )
    held = picture.held.get(worker.pid)
    holds = "unknown" if held is None else format_gb(held)
    over = ", over its slot" if held is not None and held > worker.slot else ""
    return f"{worker.id}: {label}, {holds} of {format_gb(worker.slot)}{over}, PID {worker.pid}"


def _ollama_rows(ollama: OllamaFacts) -> Iterator[Row]:
    if not ollama.asked:
        yield [Piece("Ollama is not asked")]
        return
    who = f"Ollama {ollama.version}" if ollama.version else "Ollama"
    if not ollama.answered:
        yield [Piece(f"{who} at {ollama.address}: {ollama.problem}")]
        return
    away = "" if ollama.on_this_host else ", another machine"
    none = "" if ollama.models else ": no model in VRAM"
    yield [Piece(f"{who} at {ollama.address}{away}{none}", "bold")]
    for model in ollama.models:
        spilled = model.size_vram < model.size
        yield [Piece(f"  {placed(model)}", "bold red" if spilled else "")]


def _device_document(seen: SeenDevice) -> dict[str, Any]:
    memory, device = seen.memory, seen.device
    return {
        "uuid": device.uuid,
        "name": device.name,
        "index": device.index,
        "total_bytes": memory.total if memory else None,
        "used_bytes": memory.used if memory else None,
        "free_bytes": memory.free if memory else None,
        "ollama_bytes": seen.ollama,
        "tests_bytes": seen.tests,
        "others_bytes": seen.others,
    }


def _session_document(session: PresentSession, picture: Picture) -> dict[str, Any]:
    return {
        "pid": session.pid,
        "root": session.root,
        "age_s": round(max(0.0, picture.at - session.began), 3),
        "workers": [
            {
                "id": worker.id,
                "pid": worker.pid,
                "role": worker.role,
                "device": worker.device,
                "slot_bytes": worker.slot or None,
                "held_bytes": picture.held.get(worker.pid),
            }
            for worker in session.workers
        ],
    }


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def _home(path: str) -> str:
    """A path as a person writes it."""
    home = (os.environ.get("HOME") or os.environ.get("USERPROFILE") or "").rstrip("/\\")
    return f"~{path[len(home) :]}" if home and path.startswith(home + os.sep) else path
