"""The way from settings to a plan at the start of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpushare.compat.xdist_options import GPU_AUTO, has_xdist, is_in_process, runs_tests
from pytest_gpushare.config.settings import Settings, report_files
from pytest_gpushare.config.sources import gather, load
from pytest_gpushare.errors import NoRoomError, OllamaUnreachableError, SettingsError
from pytest_gpushare.gpu.devices import GpuFacts, HostFacts
from pytest_gpushare.gpu.host import available_ram
from pytest_gpushare.gpu.sampler import LiveVram
from pytest_gpushare.ollama.models import OllamaFacts
from pytest_gpushare.ollama.reservation import unexpected
from pytest_gpushare.place import entered
from pytest_gpushare.planning.placement import (
    cuda_is_up,
    place_of,
    set_variables,
    slot_of_outer_run,
    worker_environment,
)
from pytest_gpushare.planning.plan import Limit, Plan, Request, shortage
from pytest_gpushare.planning.sizing import make_plan
from pytest_gpushare.planning.startup import Others, Probes, probe
from pytest_gpushare.session.run import LeftAlone, Started
from pytest_gpushare.units import format_gb

if TYPE_CHECKING:
    import pytest

    from pytest_gpushare.planning.startup import Loading


def keeps_own_workers(options: Any) -> bool:
    """Whether `--tx` alone names the workers; with a number xdist overwrites it."""
    return bool(getattr(options, "tx", None)) and options.numprocesses is None


def local_workers(tx: list[str]) -> int:
    """How many workers on this host the specs of `--tx` list, such as `3*popen`.

    Those to which the user gave devices are not counted: they take no slot.
    """
    count = 0
    for text in tx:
        times, star, spec = text.partition("*")
        if not (star and times.isdigit()):
            times, spec = "1", text
        parts = spec.split("//")
        kept = parts[0] == "popen" and not any(
            part.startswith(("via=", "env:CUDA_VISIBLE_DEVICES=")) for part in parts
        )
        count += int(times) if kept else 0
    return count


def request_for(config: pytest.Config) -> tuple[Request, int]:
    """What the user asked of xdist, and how many workers its `auto` would start."""
    options = config.option
    if is_in_process(options):
        return Request(in_process=True), 1
    if keeps_own_workers(options):
        return Request(local_workers(options.tx), fixed=True), 1
    given = options.numprocesses
    cpus = _xdist_auto(config, "logical" if given == "logical" else "auto")
    number = {"auto": cpus, "logical": cpus, GPU_AUTO: None}.get(given, given)
    return Request(number, options.maxprocesses or None), cpus


def _xdist_auto(config: pytest.Config, word: str) -> int:
    """xdist's count, by its own hook, which reads the word from the option."""
    given = config.option.numprocesses
    config.option.numprocesses = word
    try:
        count = config.hook.pytest_xdist_auto_num_workers(config=config)
    finally:
        config.option.numprocesses = given
    return max(1, count) if isinstance(count, int) else 1


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
    from pytest_gpushare.planning import startup

    startup.check(settings)
    probes = probe(settings, host.simulate, host.outer)
    if host.simulate:
        return probes, None
    return startup.load_first(settings, probes, host.outer)


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


def start_in_process(config: pytest.Config, outer: Mapping[str, str]) -> Started:
    """Place this process, which runs the tests itself.

    Called before the first conftest, as CUDA reads its visibility once.
    """
    options = config.known_args_namespace
    if not has_xdist(options) and options.gpu_share:
        raise SettingsError(
            "--gpu-share sizes the workers of pytest-xdist, which is not loaded: install "
            "pytest-xdist, or drop -p no:xdist"
        )
    reports = _reports(config, options)
    request = Request(in_process=True)
    settings = _settings(config)
    started = start(
        settings, request, _host(options, 1, outer), _others(config), _seen(settings, config)
    )
    started.reports = reports
    started.strict = bool(options.gpu_share_strict)
    if cuda_is_up(started.gpus.own_process_has_context):
        started.unplaced = "CUDA is up in this process already"
    else:
        config.add_cleanup(set_variables(worker_environment(started.plan, 0, started.around)))
        config.add_cleanup(entered(place_of(started.plan, 0)))
    return started


def start_workers(config: pytest.Config, outer: Mapping[str, str]) -> Started | LeftAlone | None:
    """Write the number of workers into xdist's option; None where no test is run."""
    options = config.option
    if not runs_tests(options):
        return None
    own_workers = keeps_own_workers(options)
    if own_workers and not local_workers(options.tx):
        why = "the workers of --tx are on other hosts: no GPU is assigned to them"
        return LeftAlone(f"{why}, and no report is written" if options.gpu_share_report else why)
    reports = _reports(config, options)
    request, cpus = request_for(config)
    settings = _settings(config)
    started = start(
        settings, request, _host(options, cpus, outer), _others(config), _seen(settings, config)
    )
    started.reports = reports
    started.strict = bool(options.gpu_share_strict)
    plan = started.plan
    if request.in_process:
        started.unplaced = "the plugin was loaded too late to place this process: load it with -p"
    if not own_workers:
        options.numprocesses = plan.workers
    if options.dist == "each":
        started.notes.append(
            f"--dist=each: every test runs on each of the {plan.workers} workers: "
            "use --dist=load to share them out"
        )
    return started


def _settings(config: pytest.Config) -> Settings:
    """The settings of a run; one that only asks what would happen loads no model."""
    settings = load(gather(config))
    plugins = config.pluginmanager.get_plugins() if settings.ollama_preload else ()
    if any(getattr(plugin, "gpu_share_only_asks", False) for plugin in plugins):
        from pytest_gpushare.planning.startup import check

        check(settings)
        return replace(settings, ollama_preload=False)
    return settings


def _reports(config: pytest.Config, options: Any) -> tuple[Path, ...]:
    return report_files(options.gpu_share_report, Path(config.invocation_params.dir))


def _seen(settings: Settings, config: pytest.Config) -> Mapping[str, int]:
    if not settings.ollama_models:
        return {}
    from pytest_gpushare.session.needs_store import recall_ollama_sizes

    return recall_ollama_sizes(config)


def attach(started: Started | LeftAlone, config: pytest.Config) -> None:
    """What runs beside the tests of a run that has GPU workers: pytest's cache is there by now."""
    from pytest_gpushare.session.cuda_context import known

    started.recall(known(config))
    if isinstance(started, Started) and started.plan.slots and not started.gpus.simulated:
        from pytest_gpushare.session.exclusive import Alone
        from pytest_gpushare.session.needs_store import Profile, may_have_needs

        started.has_needs = may_have_needs(started, config)
        started.alone = Alone(started)
        started.services.append(Profile(started, config))


def _others(config: pytest.Config) -> Others:
    hook = config.hook
    return Others(
        devices=lambda: chain.from_iterable(hook.pytest_gpushare_devices(config=config)),
        last_word=lambda plan: hook.pytest_gpushare_plan(config=config, plan=plan),
    )


def _host(options: Any, cpus: int, outer: Mapping[str, str]) -> Host:
    return Host(tuple(options.gpu_share_simulate or ()), cpus, outer)
