"""Ollama: how it was reached, what it holds, and where."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pytest_gpushare.cli.doctor.examine import Examined
from pytest_gpushare.cli.doctor.findings import Finding, look, ok
from pytest_gpushare.cli.doctor.project import release
from pytest_gpushare.ollama.models import LoadedModel, OllamaFacts
from pytest_gpushare.ollama.reservation import devices_of_ollama
from pytest_gpushare.report.header import ollama_lines, what_stands
from pytest_gpushare.units import format_gb

_WATERSHED = (0, 30)
"""Since this version models run in a llama-server, which fits them to the VRAM that is free."""


def ollama(found: Examined) -> Iterator[Finding]:
    """The server, its models, and its device."""
    told = found.started.ollama
    if not told.asked:
        why = found.started.settings.origins.get("enable_ollama_detection", "default")
        yield ok(f"not asked: gpu_share_enable_ollama_detection is false ({why})")
        return
    by = _reached_by(found)
    if not told.answered:
        yield _silent(found, told, by)
        return
    where = "on this host" if told.on_this_host else "on another machine: it holds no VRAM here"
    yield ok(f"Ollama {told.version or 'of unknown version'} at {told.address} ({by}), {where}")
    yield from _version(told)
    if not told.models:
        yield ok("no model is loaded")
    for model in told.models:
        yield _model(model)
    yield from _needs(found)
    yield from _device(found, told)


def _reached_by(found: Examined) -> str:
    told, settings = found.started.ollama, found.started.settings
    if settings.ollama_host:
        origin = settings.origins.get("ollama_host", "default")
        tried = (
            f", found as {told.found_by}"
            if settings.ollama_host == "auto" and told.found_by
            else ""
        )
        return f"gpu_share_ollama_host, {origin}{tried}"
    return "OLLAMA_HOST" if found.environment.get("OLLAMA_HOST") else "Ollama's default address"


def _silent(found: Examined, told: OllamaFacts, by: str) -> Finding:
    fact = f"Ollama at {told.address} ({by}): {told.problem}; {what_stands(found.started)}"
    patient = found.patient_ollama
    if patient is not None and patient.answered:
        return look(
            "ollama-slow",
            f"{fact}. Given more time, version {patient.version} answered",
            "gpu_share_ollama_timeout_s = 5",
        )
    if "is no port" in told.problem:
        return look("ollama-address", fact, "correct the port, as in OLLAMA_HOST=127.0.0.1:11434")
    if told.reachable:
        return look(
            "ollama-nonsense",
            fact,
            "name Ollama's own address: gpu_share_ollama_host = HOST:PORT; Ollama before 0.1.38 "
            "cannot tell what it holds",
        )
    elsewhere = ""
    if found.where.is_wsl or found.where.is_container:
        kind = "WSL" if found.where.is_wsl else "a container"
        elsewhere = (
            f"; from {kind} the host is gpu_share_ollama_host = host.docker.internal, or its "
            "gateway, and Ollama there must listen on 0.0.0.0"
        )
    return look(
        "ollama-silent",
        fact,
        "start it with ollama serve; or say where it is, gpu_share_ollama_host = HOST:PORT; or, "
        f"if there is none, gpu_share_preset = no-ollama{elsewhere}",
    )


def _version(told: OllamaFacts) -> Iterator[Finding]:
    version = told.version
    # Builds from source call themselves 0.0.0.
    if version and release(version) < _WATERSHED and release(version) != (0, 0, 0):
        yield look(
            "ollama-old",
            f"Ollama {version} is older than 0.30: what it says of VRAM is its own estimate, a "
            "model that is still loading counts as loaded, and it does not keep 1 GB free when "
            "it loads",
            "update Ollama, or keep more for it: gpu_share_ollama_vram_reservation_mb",
        )


def _model(model: LoadedModel) -> Finding:
    size = format_gb(model.size)
    if model.size_vram >= model.size:
        return ok(f"{model.name}: {size}, all of it on the GPU")
    part = 100 * model.size_vram // model.size
    where = f"{part} % on the GPU, the rest" if model.size_vram else "all of it"
    return look(
        "ollama-spilled",
        f"{model.name}: {size}, {where} on the CPU, where it is slow; it stays so until it is "
        "loaded anew",
        f"free VRAM, then ollama stop {model.name} and ask it something; to keep room for it, "
        "raise gpu_share_ollama_vram_reservation_mb",
    )


def _needs(found: Examined) -> Iterator[Finding]:
    """What the header says of the models that the run relies on, where that is a problem."""
    for line in list(ollama_lines(found.started, 0))[1:]:
        fact, _, mend = line.text.strip().rpartition(": ")
        if line.problem and not re.search(r"gpu_share_|^ollama ", mend):
            fact, mend = line.text, "name the reservation: gpu_share_ollama_vram_reservation_mb"
        if line.problem:
            yield look("ollama-models", fact, mend)


def _device(found: Examined, told: OllamaFacts) -> Iterator[Finding]:
    gpus, settings = found.started.gpus, found.started.settings
    for note in found.started.notes:
        if note not in gpus.problems and note.startswith("gpu_share_ollama_gpu"):
            yield look("ollama-elsewhere", note, "gpu_share_ollama_gpu = auto, or name its device")
    if not told.on_this_host or len(gpus.all_devices) < 2 or settings.ollama_vram_reservation == 0:
        return
    if devices_of_ollama(settings.ollama_gpu, gpus) is None:
        yield look(
            "ollama-device-unknown",
            f"which of {len(gpus.all_devices)} devices Ollama uses is unknown: the reservation is "
            "held on each of them",
            f"gpu_share_ollama_gpu = {gpus.all_devices[0].index} (or whichever it is)",
        )
