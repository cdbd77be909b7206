"""The way from settings to a plan at the start of a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpushare.compat.pytest_options import options_of, runs_tests
from pytest_gpushare.compat.xdist_options import (
    GPU_AUTO,
    TxWorkers,
    count_of_auto,
    distribute,
    given_most,
    given_number,
    has_xdist,
    is_in_process,
    keeps_own_workers,
    runs_each_test_everywhere,
    set_number,
)
from pytest_gpushare.config.settings import Settings
from pytest_gpushare.config.sources import gather, load, report_files
from pytest_gpushare.errors import NoRoomError, OllamaUnreachableError, SettingsError
from pytest_gpushare.gpu.devices import GpuFacts, HostFacts
from pytest_gpushare.gpu.host import available_ram
from pytest_gpushare.gpu.readings import LiveVram
from pytest_gpushare.gpu.vendors import settling_variables, variables
from pytest_gpushare.leases import AcquireTerms, set_terms
from pytest_gpushare.leases.ledger import OFF
from pytest_gpushare.neighbours import Answers, ask_all
from pytest_gpushare.ollama.models import OllamaFacts
from pytest_gpushare.ollama.reservation import devices_of_ollama, seen_larger, unexpected
from pytest_gpushare.place import entered, set_variables
from pytest_gpushare.planning.leasing import Agreed, Terms, agree, lease_plan
from pytest_gpushare.planning.placement import (
    ROLE,
    place_of,
    slot_of_outer_run,
    worker_environment,
)
from pytest_gpushare.planning.plan import LeasedByOthers, Limit, Plan, Request, shortage
from pytest_gpushare.planning.startup import PlanHooks, Probes, plan_run, probe
from pytest_gpushare.scheduler.needs import excludes_gpu_tests, uses_models
from pytest_gpushare.session.needs_store import EarlierRuns, earlier_runs
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.session.start_facts import RunOptions, StartFacts
from pytest_gpushare.session.tests import Observer
from pytest_gpushare.units import format_gb
from pytest_gpushare.wire import ITSELF

if TYPE_CHECKING:
    import pytest

    from pytest_gpushare.events import Event
    from pytest_gpushare.planning.preloading import Loading
    from pytest_gpushare.waiting_line import WaitingLine


def request_for(config: pytest.Config) -> tuple[Request, int]:
    """What the user asked of xdist, and how many workers its `auto` would start."""
    options = config.option
    if is_in_process(options):
        return Request(in_process=True), 1
    if keeps_own_workers(options):
        return Request(TxWorkers(options, variables()).local, fixed=True), 1
    given = given_number(options)
    cpus = count_of_auto(config)
    number = None if given == GPU_AUTO else cpus if isinstance(given, str) else given
    return Request(number, given_most(options)), cpus


class Host(NamedTuple):
    """Where the run takes place."""

    simulate: tuple[str, ...]
    """The devices of a what-if in place of NVML's; empty: the real ones."""
    cpus: int
    """Workers that xdist's `auto` would start."""
    environment: Mapping[str, str]
    """The environment that the plan goes by; see `environment_for_plan`."""


def environment_for_plan(before_conftests: Mapping[str, str] | None) -> dict[str, str]:
    """The environment now, but for the variables that decide what a process itself sees.

    The tests find all others as they are now, whoever set them. A conftest that hides the GPUs
    from its own process, or gives each process one, does not mean the plan: what counts is what
    the user or a plugin had set before conftests were loaded. `before_conftests` is None where
    the plugin was loaded too late to know.
    """
    environment = dict(os.environ)
    if before_conftests is not None:
        for name in settling_variables():
            environment.pop(name, None)
            if name in before_conftests:
                environment[name] = before_conftests[name]
    return environment


def start(
    settings: Settings,
    request: Request,
    host: Host,
    hooks: PlanHooks,
    earlier: EarlierRuns | None = None,
    *,
    no_gpu_tests: str = "",
    terms: Terms | None = None,
) -> StartFacts:
    """Probe and plan; `no_gpu_tests` says why no test of this run can be a GPU test.

    `terms` are those on which it shares the devices with other sessions; None: it takes no part.

    Raises `NoRoomError` where nothing fits and the fall-back is switched off,
    `OllamaUnreachableError` where Ollama has to answer and does not, and `SettingsError` for
    settings that do not fit this host.
    """
    earlier = earlier or EarlierRuns()
    probes, loading = _probed(settings, host, earlier, terms.line if terms else None)
    if no_gpu_tests:
        probes = probes._replace(gpus=GpuFacts(absence=no_gpu_tests))
    with ExitStack() as loads, ExitStack() as closing:
        closing.callback(probes.close)
        if loading is not None:
            # Only after an error: what was loaded outlives these facts where a host plans again.
            loads.callback(loading.undo)
        if settings.ollama_unreachable == "fail" and probes.ollama.asked:
            _check_answer(probes.ollama)
        facts = HostFacts(
            host.cpus,
            available_ram() if settings.ram_per_worker else None,
            slot_of_outer_run(host.environment),
        )
        gpus = probes.gpus if no_gpu_tests else hooks.with_devices(probes.gpus)
        live = LiveVram(probes.devices) if probes.devices is not None and gpus.all_devices else None
        if live is not None:
            closing.callback(live.close)
        asked = _AskedAgain(settings, host, probes.answers)

        is_phased = _is_phased(settings, earlier, request, probes)

        def make(gpus: GpuFacts, leased: LeasedByOthers, changed: Settings = settings) -> Plan:
            if is_phased:
                changed = changed._replace(ollama_vram_reservation=Fraction(0))
            return plan_run(
                changed, gpus, asked.answers, facts, request, earlier.model_sizes, leased
            )

        if terms is None or gpus.simulated:
            nobody = LeasedByOthers()
            agreed = Agreed(gpus, nobody, make(gpus, nobody))
        else:
            terms = terms._replace(
                shares_devices=not no_gpu_tests and facts.outer_slot is None,
                in_process=request.in_process,
                refresh=asked.ask if asked.has_answers else None,
            )
            agreed = agree(settings, gpus, live, make, terms)
        gpus = agreed.gpus
        if agreed.lessee is not None:
            closing.callback(agreed.lessee.close)

        def replan(changed: Settings) -> Plan:
            return make(agreed.gpus, agreed.others, changed)

        plan = hooks.revised(agreed.plan, host.cpus)
        if plan is not agreed.plan and agreed.lessee is not None:
            lease_plan(agreed.lessee, plan)
        allowed = settings.fallback_to_cpu_when_constrained or bool(no_gpu_tests)
        if not plan.slots and not allowed:
            raise NoRoomError(_no_room(plan, agreed.notes))
        release = closing.pop_all().close
        loads.pop_all()
    if loading is not None:
        loading.look_by(live, agreed.lessee)
    return StartFacts(
        settings,
        gpus,
        asked.answers,
        plan,
        replan,
        live,
        release,
        loading,
        notes=(
            *gpus.problems,
            *_unexpected(settings, gpus),
            *seen_larger(settings, gpus, probes.ollama, earlier.model_sizes),
            *agreed.notes,
        ),
        lessee=agreed.lessee,
        # A run inside a worker does not wait for the test that has started it.
        shares_models=settings.leases != OFF and ROLE not in host.environment,
        leases=agreed.leases,
        alone=agreed.alone if plan is agreed.plan else {},
        contexts=earlier.contexts,
        has_needs=(earlier.has_needs or is_phased) and bool(plan.slots) and not gpus.simulated,
        is_phased=is_phased,
        waits_for=agreed.waits_for,
    )


def _is_phased(settings: Settings, earlier: EarlierRuns, request: Request, probes: Probes) -> bool:
    """Whether VRAM is kept for Ollama only while tests use its models, so that the plan keeps none.

    Only where it follows the models, and where it is known that tests say which they use: others
    may use the server at any time.
    """
    known = settings.ollama_tests or settings.ollama_param or earlier.uses_models
    if not known and not any(uses_models(alias) for alias in settings.markers):
        return False
    if settings.ollama_phase == "beside" or settings.ollama_vram_reservation is not None:
        return False
    ollama, gpus = probes.ollama, probes.gpus
    if not (ollama.answered and ollama.on_this_host) or gpus.simulated or request.in_process:
        return False
    return bool(gpus.all_devices) and devices_of_ollama(settings.ollama_gpu, gpus) != ()


def _probed(
    settings: Settings, host: Host, earlier: EarlierRuns, line: WaitingLine | None
) -> tuple[Probes, Loading | None]:
    """What NVML and Ollama say, after its models were loaded where that is wanted."""
    if not settings.ollama_preload:
        return probe(settings, host.simulate, host.environment), None
    from pytest_gpushare.planning import preloading

    preloading.check(settings)
    probes = probe(settings, host.simulate, host.environment)
    if host.simulate:
        return probes, None
    return preloading.load_first(settings, probes, host.environment, earlier.model_sizes, line)


class _AskedAgain:
    """What the servers said last."""

    def __init__(self, settings: Settings, host: Host, answers: Answers) -> None:
        self._settings, self._host = settings, host
        self.answers = answers

    @property
    def has_answers(self) -> bool:
        """Whether any of them has answered."""
        return any(each.answered for each in self.answers.values())

    def ask(self) -> None:
        """Ask them again; one that gives no answer now holds what it held."""
        again = ask_all(self._settings, self._host.environment)
        self.answers = {
            name: again[name] if again[name].answered else before
            for name, before in self.answers.items()
        }


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


def _no_room(plan: Plan, notes: Sequence[str]) -> str:
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
    who = f" ({'; '.join(notes)})" if notes else ""
    return (
        f"gpu-share: a GPU worker needs {format_gb(plan.needed)} of VRAM, "
        f"{format_gb(plan.usable)} are left{who}; {off}: lower gpu_share_min_vram_per_worker_gb or "
        "gpu_share_ollama_vram_reservation_mb, free VRAM, or set it to true to run the tests "
        "on the CPU"
    )


def _cuda_is_up(own_process_has_context: bool) -> bool:
    """Whether CUDA was initialised in this process, so that its visibility is settled.

    Asks no framework to load: what is not imported has not initialised anything.
    """
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    is_initialized = getattr(cuda, "is_initialized", None)
    return own_process_has_context or bool(is_initialized and is_initialized())


def start_in_process(config: pytest.Config, environment: Mapping[str, str]) -> ActiveRun:
    """Place this process, which runs the tests itself.

    Called before the first conftest, as CUDA reads its visibility once.
    """
    options = options_of(config)
    if not has_xdist(options) and options.gpu_share:
        raise SettingsError(
            "--gpu-share sizes the workers of pytest-xdist, which is not loaded: install "
            "pytest-xdist, or drop -p no:xdist"
        )
    at_end = run_options(config, options)
    facts = start_locally(config, options, Request(in_process=True), 1, environment)
    is_up = _cuda_is_up(facts.gpus.own_process_has_context)
    unplaced = "CUDA is up in this process already" if is_up else ""
    run = _active(facts, config, at_end._replace(unplaced=unplaced))
    if not unplaced:
        config.add_cleanup(set_variables(worker_environment(run.plan, 0, run.placement)))
        config.add_cleanup(entered(place_of(run.plan, 0)))
    return run


def start_workers(
    config: pytest.Config, before_conftests: Mapping[str, str] | None
) -> ActiveRun | str | None:
    """Plan, and write the number of workers into xdist's option.

    None where no test is run; a sentence where the run is left as the user has set it up.
    """
    options = config.option
    if not runs_tests(options):
        return None
    own_workers = keeps_own_workers(options) and not is_in_process(options)
    if own_workers:
        distribute(options)
    named = TxWorkers(options, variables())
    if own_workers and not named.local:
        why = "the workers of --tx are on other hosts: no GPU is assigned to them"
        if named.with_devices:
            why = "the workers of --tx have devices of your own: no GPU is assigned to them"
        return f"{why}, and no report is written" if options.gpu_share_report else why
    request, cpus = request_for(config)
    at_end = run_options(config, options)
    environment = environment_for_plan(before_conftests)
    facts = start_locally(config, options, request, cpus, environment)
    if request.in_process:
        why = "the plugin was loaded too late to place this process: load it with -p"
        at_end = at_end._replace(unplaced=why)
    if runs_each_test_everywhere(options) and facts.plan.workers > 1:
        note = (
            f"--dist=each: every test runs on each of the {facts.plan.workers} workers: "
            "use --dist=load to share them out"
        )
        facts = facts._replace(notes=(*facts.notes, note))
    run = _active(facts, config, at_end)
    if not own_workers:
        set_number(options, run.plan.workers)
    return run


def start_locally(
    config: pytest.Config,
    options: Any,
    request: Request,
    cpus: int,
    environment: Mapping[str, str],
    settings: Settings | None = None,
    line: WaitingLine | None = None,
) -> StartFacts:
    """Probe this host, and plan; without `settings` by those of the run. `line`: see `Terms`."""
    settings = settings or settings_of_run(config)
    host = Host(tuple(options.gpu_share_simulate or ()), cpus, environment)
    return start(
        settings,
        request,
        host,
        _plan_hooks(config),
        earlier_runs(config, settings),
        terms=Terms(config.rootpath, only_asks=only_asks(config), line=line),
        no_gpu_tests=why_no_gpu_tests(options, settings),
    )


def why_no_gpu_tests(options: Any, settings: Settings) -> str:
    """Why no test of this run can be a GPU test; empty where some may."""
    expression = str(getattr(options, "markexpr", "") or "")
    excluded = excludes_gpu_tests(expression, settings)
    return f"-m {expression!r} selects no GPU test" if excluded else ""


def _active(facts: StartFacts, config: pytest.Config, options: RunOptions) -> ActiveRun:
    config.add_cleanup(set_terms(AcquireTerms.of(facts.settings)))
    return ActiveRun(facts, options, config=config)


def run_options(config: pytest.Config, options: Any) -> RunOptions:
    """What the command line says of the run's end. Raises `SettingsError` for a report of a kind
    that is unknown."""
    reports = report_files(options.gpu_share_report, Path(config.invocation_params.dir))
    return RunOptions(reports, bool(options.gpu_share_strict))


def settings_of_run(config: pytest.Config) -> Settings:
    """The settings of a run; one that only asks what would happen loads no model."""
    settings = load(gather(config))
    if settings.ollama_preload and only_asks(config):
        from pytest_gpushare.planning.preloading import check

        check(settings)
        return settings._replace(ollama_preload=False)
    return settings


def only_asks(config: pytest.Config) -> bool:
    """Whether no test will follow, as under `pytest-gpushare plan`."""
    plugins = config.pluginmanager.get_plugins()
    return any(getattr(plugin, "gpu_share_only_asks", False) for plugin in plugins)


def _plan_hooks(config: pytest.Config) -> PlanHooks:
    hook = config.hook
    return PlanHooks(
        devices=lambda: chain.from_iterable(hook.pytest_gpushare_devices(config=config)),
        revise=lambda plan: hook.pytest_gpushare_plan(config=config, plan=plan),
    )


def observe(run: ActiveRun, config: pytest.Config, listener: Callable[[Event], object]) -> None:
    """Follow the workers and the tests; `listener` is called with each event at once.

    In a run without workers its own process counts as one.
    """
    shift_of = run.shift_of if run.hosts else None
    observer = Observer(run.workers, run.tests, run.record, run.settings.marker, shift_of)
    config.pluginmanager.register(observer, "gpu-share-observer")
    run.record.listen(listener)
    if run.plan.request.in_process:
        run.workers.join(ITSELF, None if run.unplaced else 0, run.record.now())
        run.workers.came_up(ITSELF, os.getpid())
