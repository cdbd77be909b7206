"""The report as one document: all that the terminal knows, and the samples.

Its schema is docs/reference/report-schema.json; what changes a meaning raises `SCHEMA`. Times
are seconds since the run started, sizes are bytes, and what is unknown is null, never 0.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

from pytest_gpushare.plan.model import DevicePlan
from pytest_gpushare.report.clean import cleaned, cleaner
from pytest_gpushare.report.hints import hints
from pytest_gpushare.report.in_force import in_force
from pytest_gpushare.report.left_behind import leaks
from pytest_gpushare.report.usage import usages
from pytest_gpushare.report.verdict import verdict
from pytest_gpushare.run.crew import Member, Peak
from pytest_gpushare.run.journal import Test
from pytest_gpushare.run.started import Started
from pytest_gpushare.run.watch import Watched

SCHEMA = 1
"""The version of the schema."""

_FINISHED = (0, 1, 5)
"""pytest's exit codes of a run that came to its end."""


def document(started: Started, exit_status: int, summary: Sequence[str]) -> dict[str, Any]:
    """The document, in builtin types; `summary`: the lines that the terminal shows."""
    began = datetime.fromtimestamp(started.record.began_at, timezone.utc)
    whole = {
        "schema": SCHEMA,
        "generator": {"name": "pytest-gpushare", "version": _version("pytest-gpushare")},
        "run": {
            "started": began.isoformat(timespec="milliseconds"),
            "duration_s": _seconds(started.record.now()),
            "exit_status": exit_status,
            "finished": exit_status in _FINISHED,
            "python": platform.python_version(),
            "pytest": _version("pytest"),
            "xdist": _version("pytest-xdist"),
            "platform": platform.platform() if sys.platform != "win32" else sys.platform,
            "driver": started.gpus.driver,
            "simulated": started.gpus.simulated,
        },
        "plan": _plan(started),
        "devices": _devices(started),
        "workers": [_worker(member) for member in started.crew],
        "tests": [_test(test, started) for test in started.journal],
        "ollama": _ollama(started),
        "events": [
            {
                "at_s": _seconds(event.at),
                "kind": event.kind,
                "text": event.text,
                "facts": dict(event.facts),
            }
            for event in started.record.events()
        ],
        "samples": {"devices": _samples(started)},
        "summary": list(summary),
        "hints": [hint.text for hint in hints(started)],
        "leaks": [
            {
                "nodeid": leak.suspects[0] if leak.among == 1 else None,
                "bytes": leak.size,
                "worker": leak.worker,
                "source": leak.source,
                "suspects": list(leak.suspects),
                "suspects_count": leak.among,
            }
            for leak in leaks(started)
        ],
        "problems": _problems(started),
    }
    result: dict[str, Any] = cleaned(whole, cleaner())
    return result


def _plan(started: Started) -> dict[str, Any]:
    plan, settings = started.plan, started.settings
    return {
        "gpu_workers": len(plan.slots),
        "cpu_workers": plan.cpu_workers,
        "limited_by": [limit.value for limit in plan.limited_by],
        "presets": list(settings.presets),
        "absence": plan.absence,
        "needed_bytes": plan.needed,
        "ollama_needs": None if plan.demand is None else plan.demand.document(),
        "settings": in_force(settings),
    }


def _devices(started: Started) -> list[dict[str, Any]]:
    seen = {use.plan.device.uuid: use for use in usages(started)}
    return [
        _device(plan, seen[plan.device.uuid].watched if plan.device.uuid in seen else None)
        for plan in started.plan.devices
    ]


def _device(plan: DevicePlan, watched: Watched | None) -> dict[str, Any]:
    device = plan.device
    return {
        "uuid": device.uuid,
        "name": device.name,
        "index": device.index,
        "total_bytes": device.total,
        "used_at_start_bytes": device.used,
        "free_at_start_bytes": device.free,
        "reservation_bytes": plan.reservation,
        "resident_bytes": plan.resident,
        "safety_buffer_bytes": plan.safety_buffer,
        "budget_bytes": plan.budget,
        "workers": plan.workers,
        "peak_used_bytes": None if watched is None else watched.peak_used,
        "peak_workers_bytes": None if watched is None else watched.peak_workers or None,
    }


def _worker(member: Member) -> dict[str, Any]:
    return {
        "id": member.id,
        "role": member.role,
        "device": member.device,
        "slot_bytes": member.slot,
        "pid": member.pid,
        "started_s": _seconds(member.started),
        "ended_s": _seconds(member.ended),
        "crashed": member.crashed,
        **_peak(member.peak),
    }


def _test(test: Test, started: Started) -> dict[str, Any]:
    member = started.crew.get(test.worker)
    need, source = started.journal.need_of(test.nodeid)
    return {
        "nodeid": test.nodeid,
        "worker": test.worker,
        "device": None if member is None else member.device,
        "start_s": _seconds(test.start),
        "end_s": _seconds(test.end),
        "outcome": test.outcome,
        "need_bytes": need,
        "need_source": source,
        **_peak(test.peak),
        "left_bytes": test.left,
        "waited_s": _seconds(started.journal.wait_of(test.nodeid)),
        "attempts": test.attempts,
        "notes": started.journal.remarks_of(test.nodeid),
    }


def _peak(peak: Peak | None) -> dict[str, Any]:
    if peak is None:
        return {"peak_bytes": None, "peak_source": None}
    return {"peak_bytes": peak.size, "peak_source": peak.source}


def _ollama(started: Started) -> Mapping[str, Any] | None:
    ollama = started.ollama
    if not ollama.asked:
        return None
    book = started.guard.book if started.guard is not None else None
    words = verdict(book) if book is not None else []
    models = ollama.models if book is None else book.history.models
    return {
        "address": ollama.address,
        "version": ollama.version,
        "answered": ollama.answered or (book is not None and book.history.answered_at is not None),
        "found_by": ollama.found_by or started.settings.origins.get("ollama_host", "default"),
        "problem": ollama.problem,
        "models": [
            {
                "name": model.name,
                "size_bytes": model.size,
                "size_vram_bytes": model.size_vram,
                "spilled": model.is_spilled,
            }
            for model in models
        ],
        "verdict": ["; ".join((word.text, *word.details)) for word in words],
        "spilled_under_tests": any(word.is_ours for word in words),
    }


def _samples(started: Started) -> dict[str, Any]:
    if started.watch is None:
        return {}
    return {
        uuid: {
            "at_s": [round(at, 3) for at in watched.series.at],
            "used_bytes": list(watched.series.used),
            "ollama_bytes": watched.series.ollama(),
            "others_bytes": watched.series.others(),
            "workers_bytes": watched.series.workers(),
        }
        for uuid, watched in started.watch.devices.items()
    }


def _problems(started: Started) -> list[str]:
    found = list(started.notes)
    if started.journal.dropped:
        found.append(f"{started.journal.dropped} more tests ran than a report can hold")
    if started.record.dropped:
        found.append(f"{started.record.dropped} more events happened than a report can hold")
    return found


def _seconds(value: float | None) -> float | None:
    # Clocks of two processes, and clocks that somebody sets, may disagree a little.
    return None if value is None else round(max(0.0, value), 3)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except Exception:
        # Not installed, or its metadata is broken.
        return None
