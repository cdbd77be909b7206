"""A run on several hosts as pytest sees it: its start and its hooks.

At the start all hosts are probed at once and checked, the plan is made, and xdist is set up.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_gpushare.compat.pytest_options import runs_tests
from pytest_gpushare.compat.xdist_hosts import (
    Replacements,
    change_start,
    given_specs,
    takes_proxies,
    write_workers,
)
from pytest_gpushare.compat.xdist_options import asks_for_hosts, count_of_auto
from pytest_gpushare.config.settings import Settings
from pytest_gpushare.errors import NoRoomError, SettingsError
from pytest_gpushare.gpu.attribution import Attribution
from pytest_gpushare.gpu.devices import GpuFacts
from pytest_gpushare.hosts.agent import models_of_server, on_several_hosts
from pytest_gpushare.hosts.answers import RemoteFacts
from pytest_gpushare.hosts.asking import Answer, StartOfHosts, request_for
from pytest_gpushare.hosts.connection import HostConnection
from pytest_gpushare.hosts.hosted_run import ConnectionWatch, HostedRun
from pytest_gpushare.hosts.live import AllLive, HostLive, HostOllama, global_pid
from pytest_gpushare.hosts.part import (
    HostPart,
    in_company,
    merged,
    merged_devices,
    named,
    plan_there,
)
from pytest_gpushare.hosts.specs import (
    HostSpec,
    parse_lines,
    parse_tx,
    proxy,
    proxy_id,
    workers,
)
from pytest_gpushare.ollama.models import OllamaFacts
from pytest_gpushare.ollama.reservation import devices_of_ollama, statements
from pytest_gpushare.planning.placement import PlacementContext
from pytest_gpushare.planning.plan import Plan, Request, shortage
from pytest_gpushare.scheduler.needs import excludes_gpu_tests
from pytest_gpushare.session.needs_store import may_have_needs, recall_contexts, recall_ollama
from pytest_gpushare.session.start import (
    environment_for_plan,
    only_asks,
    run_options,
    settings_of_run,
    start_locally,
)
from pytest_gpushare.session.start_facts import RunOptions, StartFacts, placement_context
from pytest_gpushare.text import one_line, read_regular
from pytest_gpushare.units import MB
from pytest_gpushare.waiting_line import WaitingLine


def start_on_hosts(
    config: pytest.Config, before_conftests: Mapping[str, str] | None
) -> HostedRun | None:
    """Plan for all hosts, and write their workers into xdist's options; None: no test is run.

    Raises `GpuShareError`, one line for each host that cannot take part.
    """
    options = config.option
    if not runs_tests(options):
        return None
    if not takes_proxies(options):
        raise SettingsError("workers on other hosts need pytest-xdist 3.7 or newer: upgrade it")
    at_end = run_options(config, options)
    settings = on_several_hosts(settings_of_run(config))
    if settings.ollama_preload:
        from pytest_gpushare.planning.preloading import check

        check(settings)
    specs = _asked(options, settings)
    selected = str(getattr(options, "markexpr", "") or "")
    excluded = f"-m {selected!r} selects no GPU test"
    if excludes_gpu_tests(selected, settings):
        settings = settings._replace(fallback_to_cpu_when_constrained=True)
    else:
        excluded = ""
    with ExitStack() as stack:
        connections = _connect(config, settings, specs, excluded, stack)
        environment = environment_for_plan(before_conftests)

        def here(settings: Settings, line: WaitingLine) -> StartFacts:
            request, cpus = Request(), count_of_auto(config)
            return start_locally(config, options, request, cpus, environment, settings, line)

        takes_part = any(spec.is_local for spec in specs)
        hosts = StartOfHosts(settings, connections, here if takes_part else None)
        stack.callback(hosts.close)
        answers = hosts.answers(config.rootpath, strict=bool(options.gpu_share_strict))
        local = hosts.here
        parts = _parts(config, settings, local, answers)
        plan = merged(parts)
        if not plan.slots and not settings.fallback_to_cpu_when_constrained:
            raise NoRoomError(
                f"gpu-share: no GPU worker fits on any host: {shortage(plan)}; "
                "gpu_share_fallback_to_cpu_when_constrained is false: free VRAM, or set it to true"
            )
        run = _run(config, settings, local, parts, plan, at_end)
        _write_workers(options, parts)
        config.pluginmanager.register(HostHooks(run, config), "gpu-share-hosts")
        closing = stack.pop_all()
    config.add_cleanup(closing.close)
    return run


def _asked(options: Any, settings: Settings) -> tuple[HostSpec, ...]:
    if asks_for_hosts(options):
        return parse_tx(given_specs(options))
    return parse_lines(settings.hosts, settings.origins.get("hosts", "configuration"))


def _connect(
    config: pytest.Config,
    settings: Settings,
    specs: Sequence[HostSpec],
    excluded: str,
    stack: ExitStack,
) -> list[HostConnection]:
    """Log in to all of them; `excluded` says why no test can be a GPU test."""
    request = request_for(
        settings,
        simulate=config.option.gpu_share_simulate or (),
        contexts=recall_contexts(config),
        sizes=recall_ollama(config),
        no_gpu_tests=excluded,
        only_asks=only_asks(config),
        cache=_cache(config),
    )
    below = _below_root(config)
    found = []
    for spec in specs:
        if not spec.is_local:
            connection = HostConnection(spec._replace(subdirectory=below), request)
            stack.callback(connection.close)
            found.append(connection)
    return found


_SELECTING = ("lf", "failedfirst", "newfirst", "stepwise")
_CACHED = ("v/cache/lastfailed", "v/cache/nodeids", "v/cache/stepwise")
_MOST_CACHED = 16 * MB


def _cache(config: pytest.Config) -> dict[str, str]:
    """pytest's cache of earlier runs, where options select tests by it: name -> content."""
    if not any(getattr(config.option, name, False) for name in _SELECTING):
        return {}
    found = {}
    with contextlib.suppress(ValueError, KeyError):
        directory = config.rootpath / config.getini("cache_dir")
        for name in _CACHED:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                found[name] = read_regular(directory / name, _MOST_CACHED).decode()
    return found


def _below_root(config: pytest.Config) -> str:
    """Where pytest was called, relative to the root directory; empty: there, or elsewhere."""
    directory, root = Path(config.invocation_params.dir), config.rootpath
    return directory.relative_to(root).as_posix() if root in directory.parents else ""


def _parts(
    config: pytest.Config,
    settings: Settings,
    local: StartFacts | None,
    answers: Sequence[Answer],
) -> list[HostPart]:
    parts = [_local_part(settings, local)]
    taken = set(parts[0].keys)
    has_needs = may_have_needs(settings, config)
    contexts = recall_contexts(config)
    for connection, hello, facts in answers:
        devices = facts.gpus.all_devices
        keys = {
            d.uuid: f"{connection.name}:{d.uuid}" if d.uuid in taken else d.uuid for d in devices
        }
        taken.update(keys.values())
        plan = plan_there(settings, facts)
        number = len(parts)
        live = HostLive(number, connection.say, keys) if plan.slots else None
        renamed = [named(device, keys[device.uuid], connection.name) for device in devices]
        attribution = Attribution(
            _with_global_pids(renamed, number),
            parent=live.parent if live is not None else _unknown,
            alive=live.alive if live is not None else bool,
        )
        there = None
        if live is not None:
            gpus = facts.gpus._replace(devices=tuple(renamed), all_devices=tuple(renamed))
            own = merged_devices(plan, keys, connection.name)
            there = HostOllama(settings, gpus, facts.ollama, own, live, attribution)
        directory = hello.directory.rstrip("/") or "/"
        below = connection.spec.subdirectory
        root = directory.removesuffix(f"/{below}") if below else directory
        parts.append(
            HostPart(
                number,
                connection.spec._replace(chdir=directory, python=hello.executable),
                plan,
                {d.uuid: keys[d.uuid] for d in facts.gpus.devices},
                _around(settings, facts, plan, contexts, has_needs),
                live,
                attribution,
                facts.ollama,
                facts.models,
                facts.lease,
                root=root,
                path=hello.path,
                connection=connection,
                python=hello.python,
                ollama_there=there,
                cache=facts.cache,
                notes=facts.notes,
                loaded=facts.loaded,
                leases=facts.leases,
            )
        )
    return parts


def _unknown(_pid: int) -> int | None:
    return None


def _with_global_pids(devices: Any, number: int) -> list[Any]:
    return [
        replace(
            device,
            processes=None
            if device.processes is None
            else tuple(p._replace(pid=global_pid(number, p.pid)) for p in device.processes),
        )
        for device in devices
    ]


def _around(
    settings: Settings,
    facts: RemoteFacts,
    plan: Plan,
    contexts: Mapping[str, int],
    has_needs: bool,
) -> PlacementContext:
    simulated = facts.gpus.simulated
    capped = settings.cap_vram and bool(plan.slots) and not simulated
    return PlacementContext(
        outer=facts.outer,
        versions=facts.versions if capped else {},
        mps=facts.mps and capped,
        cap_vram=settings.cap_vram,
        by_index=settings.device_names == "index",
        see_all=settings.visible_devices == "all",
        simulated=simulated,
        contexts=contexts,
        budgets={d.device.uuid: d.reach for d in plan.devices} if has_needs else {},
    )


def _local_part(settings: Settings, local: StartFacts | None) -> HostPart:
    spec = HostSpec("")
    if local is None:
        nothing = Plan((), 0, (), (), (), Request(), "no worker runs there")
        placement = PlacementContext(dict(os.environ))
        return HostPart(0, spec, nothing, {}, placement, None, Attribution(), OllamaFacts())
    known = devices_of_ollama(settings.ollama_gpu, local.gpus)
    attribution = Attribution(local.gpus.all_devices, statements(known, local.ollama))
    plan = in_company(settings, local.plan)
    keys = {d.device.uuid: d.device.uuid for d in plan.devices}
    placement, models = placement_context(local, plan), models_of_server(local.ollama)
    return HostPart(0, spec, plan, keys, placement, local.live, attribution, local.ollama, models)


def _run(
    config: pytest.Config,
    settings: Settings,
    local: StartFacts | None,
    parts: Sequence[HostPart],
    plan: Plan,
    at_end: RunOptions,
) -> HostedRun:
    if local is None:
        local = StartFacts(
            settings,
            GpuFacts(absence="no worker runs on this host"),
            OllamaFacts(),
            plan,
            contexts=recall_contexts(config),
            has_needs=may_have_needs(settings, config),
        )
    lives = [part.live for part in parts if part.live is not None]
    facts = local._replace(
        plan=plan,
        replan=None,
        live=AllLive(lives) if lives else None,
        notes=(
            *local.notes,
            *(f"{part.name}: {note}" for part in parts if part.number for note in part.notes),
        ),
        leases=(*local.leases, *(f"{part.name} {text}" for part in parts for text in part.leases)),
        has_needs=may_have_needs(settings, config) and bool(plan.slots),
    )
    return HostedRun(facts, parts, at_end, config)


def _write_workers(options: Any, parts: Sequence[HostPart]) -> None:
    proxies, specs = [], []
    for part in parts:
        count = part.plan.workers
        if not count:
            continue
        if part.number:
            proxies.append(proxy(part.spec, part.number, part.spec.python, part.spec.chdir))
            specs.append(workers(part.number, count))
        else:
            specs.append(f"{count}*popen")
    write_workers(options, proxies, specs, sum(part.plan.workers for part in parts))


class HostHooks:
    """The hooks of a run on several hosts, beside those of every run."""

    def __init__(self, run: HostedRun, config: pytest.Config) -> None:
        self._run, self._config = run, config
        self._plugins = config.pluginmanager
        self._collected: set[str] = set()
        self._replacements: Replacements | None = None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionstart(self) -> Generator[None, Any, Any]:
        """Follow the hosts from before xdist starts the workers; one may be lost meanwhile."""
        self._begin()
        try:
            return (yield)
        except Exception:
            lost = [part.name for part in self._run.parts if self._is_lost(part)]
            if not lost or self._replacements is None:
                raise
            self._replacements.end_all()
            hosts = ", ".join(lost)
            raise pytest.UsageError(
                f"gpu-share: host {hosts}: lost while its workers were started: start the run again"
            ) from None

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Before xdist ends its workers: those of lost hosts are gone."""
        for part in self._run.parts:
            if part.ollama_there is not None:
                part.ollama_there.model_sizes.keep(self._config)
            if self._is_lost(part) and self._replacements is not None:
                self._replacements.forget(proxy_id(part.number))

    def _is_lost(self, part: HostPart) -> bool:
        if not part.number or not part.plan.workers or self._replacements is None:
            return False
        return bool(part.lost) or not self._is_connected(part)

    def _begin(self) -> None:
        self._replacements = Replacements(self._plugins)
        self._replacements.ask(self._refusal)
        for part in self._run.parts:
            if part.connection is not None:
                ConnectionWatch(self._run, part, self._cut).begin()

    def _cut(self, part: HostPart) -> None:
        if self._replacements is not None:
            self._replacements.cut(proxy_id(part.number))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """A worker is about to be started."""
        part = self._run.host_of(node.gateway.spec)
        if part is not None and part.number:
            worker = node.gateway.id
            change_start(node, lambda start: self._run.start_of(worker, part, start))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any) -> None:
        """A worker has collected."""
        self._collected.add(node.gateway.id)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """A worker has ended; is it the only one of its host?"""
        part = self._run.host_of(node.gateway.spec)
        if error is None or part is None or not part.number or self._replacements is None:
            return
        if not hasattr(node, "workerinfo") or not self._is_connected(part):
            self._cannot_start(part, node, str(error))

    def _cannot_start(self, part: HostPart, node: Any, error: str) -> None:
        """A worker of a host is gone and no other can come in its place."""
        if not self._is_connected(part):
            self._run.lose(part, "its connection has ended")
            return
        lines = [line for line in error.splitlines() if line.strip()]
        why = one_line(lines[-1], 200) if lines else "no reason is known"
        self._run.lose(part, f"{node.gateway.id} cannot start there: {why}")

    def _is_connected(self, part: HostPart) -> bool:
        replacements = self._replacements
        return replacements is not None and replacements.is_connected(proxy_id(part.number))

    def _refusal(self, node: Any, problem: str) -> str:
        part = self._run.host_of(node.gateway.spec)
        if part is not None and problem:
            self._cannot_start(part, node, problem)
        if part is None or not part.lost or self._replacements is None:
            return ""
        if node.gateway.id not in self._collected:
            self._replacements.wait_for_one_less()
        others = [each for each in self._run.parts if each.plan.workers and not each.lost]
        if not others:
            self._replacements.stop(f"no host is left: {part.name}: {part.lost}")
        return f"worker {node.gateway.id} is not replaced: host {part.name}: {part.lost}"
