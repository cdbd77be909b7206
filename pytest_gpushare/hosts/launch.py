"""A run on several hosts as pytest sees it: its start and its hooks.

At the start all hosts are probed at once and checked, the plan is made, and xdist is set up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
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
from pytest_gpushare.gpu.devices import GpuFacts
from pytest_gpushare.hosts.agent import on_several_hosts
from pytest_gpushare.hosts.asking import StartOfHosts, request_for
from pytest_gpushare.hosts.checkout import checkout_of
from pytest_gpushare.hosts.connection import HostConnection
from pytest_gpushare.hosts.hosted_run import ConnectionWatch, HostedRun
from pytest_gpushare.hosts.live import AllLive
from pytest_gpushare.hosts.part import (
    Earlier,
    HostPart,
    OtherHost,
    merged,
    part_here,
    part_there,
)
from pytest_gpushare.hosts.specs import (
    HostSpec,
    parse_lines,
    parse_tx,
    proxy,
    proxy_id,
    workers,
)
from pytest_gpushare.planning.plan import Plan, Request, shortage
from pytest_gpushare.session.needs_store import may_have_needs, recall_contexts, recall_ollama
from pytest_gpushare.session.start import (
    environment_for_plan,
    only_asks,
    run_options,
    settings_of_run,
    start_locally,
    why_no_gpu_tests,
)
from pytest_gpushare.session.start_facts import StartFacts
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
    excluded = why_no_gpu_tests(options, settings)
    if excluded:
        settings = settings._replace(fallback_to_cpu_when_constrained=True)
    with ExitStack() as stack:
        connections = _connect(config, settings, specs, excluded, stack)
        environment = environment_for_plan(before_conftests)

        def here(settings: Settings, line: WaitingLine) -> StartFacts:
            request, cpus = Request(), count_of_auto(config)
            return start_locally(config, options, request, cpus, environment, settings, line)

        takes_part = any(spec.is_local for spec in specs)
        hosts = StartOfHosts(
            settings,
            connections,
            here if takes_part else None,
            checkout_of(config.rootpath),
            strict=bool(options.gpu_share_strict),
        )
        stack.callback(hosts.close)
        hosts.ask()
        local = hosts.here
        earlier = Earlier(recall_contexts(config), may_have_needs(settings, config))
        this, others = part_here(settings, local), list[OtherHost]()
        for number, host in enumerate(hosts.hosts, 1):
            taken = {key for part in (this, *others) for key in part.keys.values()}
            others.append(part_there(settings, number, host, taken, earlier))
        plan = merged((this, *others))
        if not plan.slots and not settings.fallback_to_cpu_when_constrained:
            raise NoRoomError(
                f"gpu-share: no GPU worker fits on any host: {shortage(plan)}; "
                "gpu_share_fallback_to_cpu_when_constrained is false: free VRAM, or set it to true"
            )
        facts = _facts(local or _nothing_here(settings, plan), plan, others, earlier)
        run = HostedRun(facts, this, others, at_end, config)
        _write_workers(options, this, others)
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


def _nothing_here(settings: Settings, plan: Plan) -> StartFacts:
    gpus = GpuFacts(absence="no worker runs on this host")
    return StartFacts(settings, gpus, {}, plan)


def _facts(
    local: StartFacts, plan: Plan, others: Sequence[OtherHost], earlier: Earlier
) -> StartFacts:
    """What was found on all hosts, from what was found on this one."""
    lives = [live for live in (local.live, *(part.live for part in others)) if live is not None]
    there = [(part.name, part.answer) for part in others]
    return local._replace(
        plan=plan,
        replan=None,
        live=AllLive(lives) if lives else None,
        notes=(*local.notes, *(f"{name}: {note}" for name, a in there for note in a.notes)),
        leases=(*local.leases, *(f"{name} {text}" for name, a in there for text in a.leases)),
        contexts=earlier.contexts,
        has_needs=earlier.has_needs and bool(plan.slots),
    )


def _write_workers(options: Any, here: HostPart, others: Sequence[OtherHost]) -> None:
    proxies, specs = [], []
    if here.plan.workers:
        specs.append(f"{here.plan.workers}*popen")
    for part in others:
        if part.plan.workers:
            proxies.append(proxy(part.spec, part.number, part.spec.python, part.spec.chdir))
            specs.append(workers(part.number, part.plan.workers))
    write_workers(options, proxies, specs, sum(part.plan.workers for part in (here, *others)))


class HostHooks:
    """The hooks of a run on several hosts, beside those of every run."""

    def __init__(self, run: HostedRun, config: pytest.Config) -> None:
        self._run, self._config = run, config
        self._collected: set[str] = set()
        self._replacements = Replacements(config.pluginmanager)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionstart(self) -> Generator[None, Any, Any]:
        """Follow the hosts from before xdist starts the workers; one may be lost meanwhile."""
        self._replacements.ask(self._refusal)
        for part in self._run.others:
            ConnectionWatch(self._run, part, self._cut).begin()
        try:
            return (yield)
        except Exception:
            lost = [part.name for part in self._run.others if self._is_lost(part)]
            if not lost:
                raise
            self._replacements.end_all()
            hosts = ", ".join(lost)
            raise pytest.UsageError(
                f"gpu-share: host {hosts}: lost while its workers were started: start the run again"
            ) from None

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Before xdist ends its workers: those of lost hosts are gone."""
        for part in self._run.others:
            if part.ollama_there is not None:
                part.ollama_there.model_sizes.keep(self._config)
            if self._is_lost(part):
                self._replacements.forget(proxy_id(part.number))

    def _is_lost(self, part: OtherHost) -> bool:
        return bool(part.plan.workers) and (bool(part.lost) or not self._is_connected(part))

    def _is_connected(self, part: OtherHost) -> bool:
        return self._replacements.is_connected(proxy_id(part.number))

    def _cut(self, part: OtherHost) -> None:
        self._replacements.cut(proxy_id(part.number))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """A worker is about to be started."""
        part = self._run.host_of(node.gateway.spec)
        if isinstance(part, OtherHost):
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
        if error is None or not isinstance(part, OtherHost):
            return
        if not hasattr(node, "workerinfo") or not self._is_connected(part):
            self._cannot_start(part, node, str(error))

    def _cannot_start(self, part: OtherHost, node: Any, error: str) -> None:
        """A worker of a host is gone and no other can come in its place."""
        if not self._is_connected(part):
            self._run.lose(part, "its connection has ended")
            return
        lines = [line for line in error.splitlines() if line.strip()]
        why = one_line(lines[-1], 200) if lines else "no reason is known"
        self._run.lose(part, f"{node.gateway.id} cannot start there: {why}")

    def _refusal(self, node: Any, problem: str) -> str:
        part = self._run.host_of(node.gateway.spec)
        if not isinstance(part, OtherHost):
            return ""
        if problem:
            self._cannot_start(part, node, problem)
        if not part.lost:
            return ""
        if node.gateway.id not in self._collected:
            self._replacements.wait_for_one_less()
        others = [each for each in self._run.parts if each.plan.workers and not each.lost]
        if not others:
            self._replacements.stop(f"no host is left: {part.name}: {part.lost}")
        return f"worker {node.gateway.id} is not replaced: host {part.name}: {part.lost}"
