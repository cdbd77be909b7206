"""The way from settings to a plan at the start of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.errors import NoRoomError, OllamaUnreachableError
from pytest_gpushare.plan.model import Limit, Plan, Request
from pytest_gpushare.plan.ollama_share import unexpected
from pytest_gpushare.plan.shortage import shortage
from pytest_gpushare.plan.sizing import make_plan
from pytest_gpushare.probe.facts import GpuFacts, HostFacts, OllamaFacts
from pytest_gpushare.probe.host import available_ram
from pytest_gpushare.probe.together import Probes, probe
from pytest_gpushare.run.live import LiveVram
from pytest_gpushare.run.others import Others
from pytest_gpushare.run.placement import slot_of_outer_run
from pytest_gpushare.run.started import Started
from pytest_gpushare.settings.values import Settings
from pytest_gpushare.units import format_gb

if TYPE_CHECKING:
    from pytest_gpushare.run.preloading import Loading


class Host(NamedTuple):
    """Where the run takes place."""

    simulate: tuple[str, ...]
    """The devices of a what-if in place of NVML's; empty: the real ones."""
    cpus: int
    """Workers that xdist's `auto` would start."""
    outer: Mapping[str, str]
    """The environment as it was before any conftest could change it."""


def start(
    settings: Settings,
    request: Request,
    host: Host,
    others: Others,
    seen: Mapping[str, int] = MappingProxyType({}),
) -> Started:
    """Probe and plan; `seen` has the sizes of Ollama's models in earlier runs.

    Raises `NoRoomError` where nothing fits and the fall-back is switched off,
    `OllamaUnreachableError` where Ollama has to answer and does not, and `SettingsError` for
    settings that do not fit this host.
    """
    probes, loading = _probed(settings, host)
    try:
        if settings.ollama_unreachable == "fail" and probes.ollama.asked:
            _check_answer(probes.ollama)
        facts = HostFacts(
            host.cpus,
            available_ram() if settings.ram_per_worker else None,
            slot_of_outer_run(host.outer),
        )
        gpus = others.joined(probes.gpus)
        plan = make_plan(settings, gpus, probes.ollama, facts, request, seen)
        plan = others.revised(plan, host.cpus)
        if not plan.slots and not settings.fallback_to_cpu_when_constrained:
            raise NoRoomError(_no_room(plan))
    except BaseException:
        probes.close()
        if loading is not None:
            loading.undo()
        raise
    live = LiveVram(probes.nvml) if probes.nvml is not None and gpus.all_devices else None
    started = Started(settings, gpus, probes.ollama, plan, _closing(live, probes.close), live=live)
    started.replan = lambda changed: make_plan(changed, gpus, probes.ollama, facts, request, seen)
    started.notes += gpus.problems
    started.notes += _unexpected(settings, gpus)
    for model in probes.ollama.models:
        started.saw(model)
    if loading is not None:
        _keep_loaded(started, loading)
    return started


def _probed(settings: Settings, host: Host) -> tuple[Probes, Loading | None]:
    """What NVML and Ollama say, after its models were loaded where that is wanted."""
    if not settings.ollama_preload:
        return probe(settings, host.simulate, host.outer), None
    from pytest_gpushare.run import preloading

    preloading.check(settings)
    probes = probe(settings, host.simulate, host.outer)
    if host.simulate:
        return probes, None
    return preloading.load_first(settings, probes, host.outer)


def _keep_loaded(started: Started, loading: Loading) -> None:
    started.notes += loading.problems
    for text in loading.told:
        started.record.note("ollama-preloaded", text)
    if loading.kept is not None:
        started.services.append(loading.kept)
        # Also where the run ends before its services began.
        started.close = _both(loading.undo, started.close)


def _check_answer(ollama: OllamaFacts) -> None:
    if not ollama.answered:
        raise OllamaUnreachableError(
            f"gpu-share: Ollama at {ollama.address}: {ollama.problem}; "
            "gpu_share_ollama_unreachable is fail: start Ollama, correct gpu_share_ollama_host, "
            "or set it to reserve or release"
        )


def _unexpected(settings: Settings, gpus: GpuFacts) -> list[str]:
    """Where Ollama is on a device that the user did not name."""
    return [
        f"gpu_share_ollama_gpu = {', '.join(settings.ollama_gpu)}, but NVML lists Ollama on "
        f"{device.label}: VRAM is reserved for it there, too"
        for device in unexpected(settings.ollama_gpu, gpus)
    ]


def _closing(live: LiveVram | None, close: Callable[[], None]) -> Callable[[], None]:
    """Nobody may read once the library is closed."""
    return close if live is None else _both(live.close, close)


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        first()
        second()

    return both


def _no_room(plan: Plan) -> str:
    off = "gpu_share_fallback_to_cpu_when_constrained is false"
    if plan.absence:
        return (
            f"gpu-share: no GPU for the workers: {plan.absence}; {off}: "
            "set it to true to run the tests on the CPU"
        )
    if all(planned.limited_by is Limit.BY_MODE for planned in plan.devices):
        return (
            f"gpu-share: no GPU for the workers: {shortage(plan)}; {off}: change the mode with "
            "nvidia-smi -c, or set it to true to run the tests on the CPU"
        )
    if plan.limited_by == (Limit.HOOK,):
        return f"gpu-share: {shortage(plan)}; {off}: change the hook, or set it to true"
    return (
        f"gpu-share: a GPU worker needs {format_gb(plan.needed)} of VRAM, "
        f"{format_gb(plan.usable)} are left; {off}: lower gpu_share_min_vram_per_worker_gb or "
        "gpu_share_ollama_vram_reservation_mb, free VRAM, or set it to true to run the tests "
        "on the CPU"
    )
