"""Settings and where they came from, what a run would do with them, and the project's files."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from pytest_gpushare.cli.doctor.findings import Finding, broken, look, ok
from pytest_gpushare.cli.doctor.gather import Examined
from pytest_gpushare.plan.model import Limit
from pytest_gpushare.plan.shortage import shortage
from pytest_gpushare.report.in_force import in_words
from pytest_gpushare.report.terminal import header
from pytest_gpushare.settings.options import JSON_FILE, OPTIONS
from pytest_gpushare.units import GB, format_number


def settings(found: Examined) -> Iterator[Finding]:
    """The files, the switch, and each setting that is not the default."""
    view = found.pytest
    if found.settings_error:
        yield broken(
            "settings-refused", found.settings_error, "correct it; the line names the place"
        )
    if view.error:
        return
    name = Path(view.configuration).name if view.configuration else ""
    yield ok(f"configuration file: {name}" if name else "no configuration file of pytest")
    yield from _asked(found)
    if view.strict and found.pytest.written is not None and found.pytest.written.ini:
        yield look(
            "strict-config",
            f"{name} is read strictly (--strict-config, or strict = true): where pytest-gpushare "
            "is not installed, its keys there are an error",
            f"move them to {JSON_FILE}, and ask with --gpu-share on the command line",
        )
    for option in OPTIONS:
        origin = found.settings.origins.get(option.key, "default")
        if origin != "default":
            value = getattr(found.settings, option.attribute)
            yield ok(f"{option.ini} = {in_words(option, value)} ({origin})")


def _asked(found: Examined) -> Iterator[Finding]:
    view = found.pytest
    if view.switched_on or view.asked_by_arguments:
        how = "gpu_share = true" if view.switched_on else "addopts or PYTEST_ADDOPTS"
        yield ok(f"each run asks for the plugin ({how})")
    elif any(origin == JSON_FILE for origin in found.settings.origins.values()):
        yield look(
            "json-alone",
            f"{JSON_FILE} has settings, but alone it does not switch the plugin on",
            "gpu_share = true in the configuration file, or pytest --gpu-share",
        )
    else:
        yield ok("a run asks for the plugin with --gpu-share or -n gpu-auto alone")


def plan(found: Examined) -> Iterator[Finding]:
    """What a run would do here."""
    if found.start_error:
        yield broken("run-refused", found.start_error, "correct the setting that it names")
        return
    started = found.started
    headline = next(
        line.text for line in header(started, 0) if line.text.startswith("gpu-share: ")
    ).removeprefix("gpu-share: ")
    if started.plan.slots:
        yield ok(f"a run would start {headline}")
        return
    fact = f"a run would start {headline}"
    if not found.settings.fallback_to_cpu_when_constrained:
        fact = f"a run would fail: {shortage(started.plan)}"
    report = look if found.settings.fallback_to_cpu_when_constrained else broken
    if started.plan.absence:
        yield report("no-gpu-for-tests", fact, "see what is said of the driver and the devices")
    elif all(planned.limited_by is Limit.BY_MODE for planned in started.plan.devices):
        yield report("compute-mode", fact, "see what is said of the devices")
    else:
        yield report("no-room", fact, _make_room(found))


def _make_room(found: Examined) -> str:
    """Settings with which one worker would fit, computed from the best device."""
    best = max(found.started.plan.devices, key=lambda planned: planned.budget)
    need = found.settings.min_vram_per_worker
    ways = []
    missing = need - best.budget
    if best.outstanding >= missing:
        left = int((best.reservation - missing) // 2**20)
        ways.append(f"gpu_share_ollama_vram_reservation_mb = {left}")
    if best.budget >= GB // 2:
        least = Fraction(best.budget * 100 // GB, 100)
        ways.append(f"gpu_share_min_vram_per_worker_gb = {format_number(least)}")
    if best.reservation:
        ways.append("gpu_share_preset = no-ollama where there is no Ollama")
    return "; or ".join([*ways, "free VRAM on the device"])


def files(found: Examined) -> Iterator[Finding]:
    """Conftests that change what a worker sees."""
    for where in found.overwriting:
        yield look(
            "conftest-overwrites",
            f"{where} sets CUDA_VISIBLE_DEVICES, and so overrules the device that the run gives",
            "take it out, and set the variable outside for the whole run; --gpu-share-strict makes "
            "it an error",
        )
    if not found.overwriting:
        yield ok("no conftest.py sets CUDA_VISIBLE_DEVICES")
