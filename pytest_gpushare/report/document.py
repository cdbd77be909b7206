"""The report as one document: all that the terminal knows, and the samples.

Its schema is report-schema.json beside this module; what changes a meaning raises `SCHEMA`. Times
are seconds since the run started, sizes are bytes, and what is unknown is null, never 0.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

from pytest_gpushare import __version__
from pytest_gpushare.config.kinds import kind_of
from pytest_gpushare.config.options import OPTIONS
from pytest_gpushare.config.settings import Settings
from pytest_gpushare.gpu.readings import DevicePeaks, Series
from pytest_gpushare.neighbours import Answers, other_servers
from pytest_gpushare.ollama.address import without_secrets
from pytest_gpushare.ollama.models import OLLAMA, LoadedModel, OllamaFacts
from pytest_gpushare.planning.leasing import shares_of_other_servers
from pytest_gpushare.planning.placement import PlacementContext, caps_of
from pytest_gpushare.planning.plan import DevicePlan, Plan, shortage
from pytest_gpushare.report.header import header, left_out
from pytest_gpushare.report.ollama_lines import document_of_tests, verdict
from pytest_gpushare.report.results import Results, Usage
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.session.workers import Peak, WorkerRecord
from pytest_gpushare.text import redacted, redactor


def in_force(settings: Settings) -> dict[str, dict[str, str]]:
    """Key -> `value`, as its user would write it, and `origin`; no secrets of a URL."""
    found = {
        option.key: {
            "value": kind_of(option).write(getattr(settings, option.attribute)),
            "origin": settings.origins.get(option.key, "default"),
        }
        for option in OPTIONS
    }
    found["ollama_host"]["value"] = without_secrets(settings.ollama_host)
    return found


SCHEMA = 1
"""The version of the schema."""

_FINISHED = (0, 1, 5)
"""pytest's exit codes of a run that came to its end."""


def document(results: Results, exit_status: int, summary: Sequence[str]) -> dict[str, Any]:
    """The document, in builtin types; `summary`: the lines that the terminal shows."""
    run, assessment = results.run, results.assessment
    began = datetime.fromtimestamp(run.record.began_at, timezone.utc)
    whole = {
        "schema": SCHEMA,
        "generator": generator(),
        "run": {
            "started": began.isoformat(timespec="milliseconds"),
            "duration_s": _seconds(run.record.now()),
            "exit_status": exit_status,
            "finished": exit_status in _FINISHED,
            "python": platform.python_version(),
            "pytest": _version("pytest"),
            "xdist": _version("pytest-xdist"),
            "platform": platform.platform() if sys.platform != "win32" else sys.platform,
            "driver": run.gpus.driver,
            "simulated": run.gpus.simulated,
        },
        "plan": _plan(run),
        "devices": devices(results),
        "workers": [_worker(member, results) for member in results.workers],
        "tests": _tests(results),
        "ollama": _ollama(run),
        **servers_document(run.facts.answers),
        "events": [
            {
                "at_s": _seconds(event.at),
                "kind": event.kind,
                "text": event.text,
                "facts": dict(event.facts),
            }
            for event in run.record.events()
        ],
        "samples": {"devices": _samples(run), "leases": _leases(run)},
        "summary": list(summary),
        "hints": [advice.text for advice in (*assessment.needs, *assessment.advice)],
        "shortages": list(assessment.shortages),
        "leaks": [
            {
                "nodeid": leak.suspects[0] if leak.among == 1 else None,
                "bytes": leak.size,
                "worker": leak.worker,
                "source": leak.source,
                "suspects": list(leak.suspects),
                "suspects_count": leak.among,
            }
            for leak in results.leaks
        ],
        "problems": _problems(run),
    }
    result: dict[str, Any] = redacted(_add_hosts(whole, run), redactor())
    return result


def _add_hosts(document: dict[str, Any], run: ActiveRun) -> dict[str, Any]:
    """The document, with the host of each device, worker and test where there are several."""
    if not run.hosts:
        return document
    # Only a run on several hosts needs it.
    from pytest_gpushare.hosts.live import pid_there

    workers = {member.id: run.host_named(member.id) for member in run.workers}
    document["hosts"] = _hosts(run)
    for device, planned in zip(document["devices"], run.plan.devices, strict=True):
        device["host"] = planned.device.host or None
    for worker in document["workers"]:
        worker["host"] = workers.get(worker["id"])
        if worker["pid"] is not None:
            worker["pid"] = pid_there(worker["pid"])
    for test in document.get("tests", ()):
        test["host"] = workers.get(test["worker"])
    return document


def _hosts(run: ActiveRun) -> list[dict[str, Any]]:
    return [
        {
            "name": host.name or None,
            "python": host.python or None,
            "gpu_workers": len(host.plan.slots),
            "cpu_workers": host.plan.cpu_workers,
            "shortage": "" if host.plan.slots else shortage(host.plan),
            "lost": host.lost,
        }
        for host in run.hosts
    ]


def _plan(run: ActiveRun) -> dict[str, Any]:
    """The plan, for the report and for `plan --json`."""
    plan = run.plan
    return {
        "gpu_workers": len(plan.slots),
        "cpu_workers": plan.cpu_workers,
        "in_process": plan.request.in_process,
        "limited_by": [limit.value for limit in plan.limited_by],
        "limits": {limit.value: most for limit, most in plan.limits},
        "presets": list(run.settings.presets),
        "absence": plan.absence,
        "shortage": "" if plan.slots else shortage(plan),
        "needed_bytes": plan.needed,
        "ollama_needs": None if plan.demand is None else plan.demand.document(),
        "settings": in_force(run.settings),
    }


def _device(planned: DevicePlan, when: str = "") -> dict[str, Any]:
    """A device of the plan; `when` stands in the names of what may change."""
    device = planned.device
    return {
        "uuid": device.uuid,
        "name": device.name,
        "index": device.index,
        "total_bytes": device.total,
        f"used{when}_bytes": device.used,
        f"free{when}_bytes": device.free,
        "unified": device.unified,
        "reservation_bytes": planned.reservation,
        "resident_bytes": planned.resident,
        "outstanding_bytes": planned.outstanding,
        "safety_buffer_bytes": planned.safety_buffer,
        "leases_bytes": planned.leases,
        "budget_bytes": planned.budget,
        "workers": planned.workers,
        "slot_bytes": planned.slot_vram or None,
        "limited_by": planned.limited_by.value,
        **_servers_on(planned),
    }


def _servers_on(planned: DevicePlan) -> dict[str, Any]:
    """What is kept for other servers than Ollama; nothing where there are none."""
    found = {
        share.name: {"reservation_bytes": share.reservation, "resident_bytes": share.resident}
        for share in shares_of_other_servers(planned)
        if share.reservation
    }
    return {"servers": found} if found else {}


def ollama_document(ollama: OllamaFacts) -> dict[str, Any] | None:
    """What the server answered; None where it was not asked."""
    if not ollama.asked:
        return None
    return {
        "address": ollama.address,
        "version": ollama.version,
        "found_by": ollama.found_by,
        "answered": ollama.answered,
        "on_this_host": ollama.on_this_host,
        "problem": ollama.problem,
        "models": _models(ollama.models),
    }


def servers_document(answers: Answers) -> dict[str, Any]:
    """What other servers than Ollama answered; nothing where none was asked."""
    found = [
        {
            "name": name,
            "address": answer.address,
            "version": answer.version,
            "answered": answer.answered,
            "on_this_host": answer.on_this_host,
            "problem": answer.problem,
            "vram_bytes": answer.vram if answer.answered else None,
        }
        for name, answer in other_servers(answers).items()
    ]
    return {"servers": found} if found else {}


def _models(models: Iterable[LoadedModel]) -> list[dict[str, Any]]:
    return [
        {
            "name": model.name,
            "size_bytes": model.size,
            "size_vram_bytes": model.size_vram,
            "spilled": model.is_spilled,
        }
        for model in models
    ]


def devices(results: Results) -> list[dict[str, Any]]:
    """The devices of the plan, as they were at its start, and their peaks."""
    watched = {use.plan.device.uuid: use for use in results.usages}
    return [
        {**_device(plan, "_at_start"), **_peaks(watched.get(plan.device.uuid))}
        for plan in results.run.plan.devices
    ]


def _peaks(use: Usage | None) -> dict[str, int | None]:
    peaks = DevicePeaks() if use is None else use.peaks
    # Where the driver attributes nothing, nobody knows whose the rise was.
    is_known = use is not None and use.is_attributed
    return {
        "peak_used_bytes": peaks.used,
        "peak_used_exact": None if peaks.used is None else peaks.is_used_exact,
        "peak_workers_bytes": peaks.workers or None,
        "peak_tests_bytes": peaks.rise if is_known else None,
        "peak_tests_exact": peaks.is_rise_exact if is_known else None,
        "peak_unattributed_bytes": peaks.unattributed if is_known else None,
    }


def _worker(member: WorkerRecord, results: Results) -> dict[str, Any]:
    return {
        "id": member.id,
        "role": member.role,
        "device": member.device,
        "slot_bytes": member.slot,
        "need_bytes": results.largest_needs.get(member.id),
        "pid": member.pid,
        "started_s": _seconds(member.started),
        "ended_s": _seconds(member.ended),
        "crashed": member.crashed,
        **_peak(results.held[member.id]),
    }


def _tests(results: Results) -> list[dict[str, Any]]:
    kept = results.run.tests
    placed = {member.id: member.device for member in results.workers}
    return [
        {
            "nodeid": test.nodeid,
            "worker": test.worker,
            "device": placed.get(test.worker),
            "start_s": _seconds(test.start),
            "end_s": _seconds(test.end),
            "outcome": test.outcome,
            "need_bytes": (need := kept.needs.get(test.nodeid, (None, None)))[0],
            "need_source": need[1],
            **_peak(test.peak),
            "left_bytes": test.left,
            "waited_s": _seconds(kept.waits.get(test.nodeid, 0.0)),
            "attempts": test.attempts,
            "notes": kept.remarks.get(test.nodeid, []),
        }
        for test in results.tests
    ]


def _peak(peak: Peak | None) -> dict[str, Any]:
    if peak is None:
        return {"peak_bytes": None, "peak_source": None, "peak_exact": None}
    return {"peak_bytes": peak.size, "peak_source": peak.source, "peak_exact": peak.exact}


def _ollama(run: ActiveRun) -> Mapping[str, Any] | None:
    """What the server answered, and what became of its models."""
    found = ollama_document(run.ollama)
    if found is None:
        return None
    server = run.monitor.server if run.monitor is not None else None
    sentences = verdict(server) if server is not None else []
    if server is not None:
        found["answered"] |= server.history.answered_at is not None
        found["models"] = _models(server.history.models)
    found["found_by"] = found["found_by"] or run.settings.origins.get("ollama_host", "default")
    return {
        **found,
        "verdict": ["; ".join((each.text, *each.details)) for each in sentences],
        "spilled_under_tests": any(each.is_ours for each in sentences),
        "tests": _model_tests(run),
    }


def _model_tests(run: ActiveRun) -> Mapping[str, Any] | None:
    """The tests that used models; null where there were none."""
    return None if run.llm is None else document_of_tests(run.llm)


def _samples(run: ActiveRun) -> dict[str, Any]:
    return {
        uuid: {
            "at_s": [round(at, 3) for at in watched.series.at],
            "used_bytes": list(watched.series.used),
            "ollama_bytes": watched.series.neighbour(OLLAMA),
            "others_bytes": watched.series.others(),
            "workers_bytes": watched.series.workers(),
            **_samples_of_servers(watched.series),
        }
        for uuid, watched in run.samples.items()
    }


def _samples_of_servers(series: Series) -> dict[str, Any]:
    """What other servers than Ollama held; nothing where none held anything."""
    found = {name: held for name, held in series.neighbours().items() if name != OLLAMA}
    return {"servers_bytes": found} if found else {}


def _leases(run: ActiveRun) -> list[dict[str, Any]]:
    """What other sessions had leased."""
    return [
        {
            "device": lease.device,
            "session": lease.session,
            "start_s": _seconds(lease.begin),
            "end_s": _seconds(lease.end),
            "bytes": lease.size,
        }
        for lease in run.other_leases
    ]


def _problems(run: ActiveRun) -> list[str]:
    found = list(run.notes)
    if run.tests.dropped:
        found.append(f"{run.tests.dropped} more tests ran than a report can hold")
    if run.record.dropped:
        found.append(f"{run.record.dropped} more events happened than a report can hold")
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


PLAN_SCHEMA = 1


def generator() -> dict[str, str]:
    """Who wrote the document."""
    return {"name": "pytest-gpushare", "version": __version__}


def left_out_document(reason: str) -> dict[str, Any]:
    """What `plan --json` prints for a run that the plugin leaves as it is."""
    lines = [line.text for line in left_out(reason)]
    return {"schema": PLAN_SCHEMA, "generator": generator(), "plan": None, "devices": [],
            "workers": [], "ollama": None, "problems": [reason], "lines": lines}  # fmt: skip


def plan_document(run: ActiveRun) -> dict[str, Any]:
    """What `plan --json` prints."""
    whole = {
        "schema": PLAN_SCHEMA,
        "generator": generator(),
        "simulated": run.gpus.simulated,
        "driver": run.gpus.driver,
        "plan": _plan(run),
        "devices": [_device(device) for device in run.plan.devices],
        "workers": _workers(run.plan, run.placement),
        "ollama": ollama_document(run.ollama),
        **servers_document(run.facts.answers),
        "problems": list(run.notes),
        "lines": [line.text for line in header(run, 0)],
    }
    document: dict[str, Any] = redacted(_add_hosts(whole, run), redactor())
    return document


def _workers(plan: Plan, placement: PlacementContext) -> list[dict[str, Any]]:
    gpu: list[dict[str, Any]] = [
        {
            "id": "this process" if plan.request.in_process else f"gw{number}",
            "role": "gpu",
            "device": slot.device.uuid,
            "slot_bytes": slot.vram,
            "caps": list(caps_of(slot, placement).descriptions),
        }
        for number, slot in enumerate(plan.slots)
    ]
    cpu: list[dict[str, Any]] = [
        {"id": f"gw{number}", "role": "cpu", "device": None, "slot_bytes": None, "caps": []}
        for number in range(len(gpu), len(gpu) + plan.cpu_workers)
    ]
    return gpu + cpu
