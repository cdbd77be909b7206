"""The start of a pytest run: settings, probe and plan, then `-n` and the workers' places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpushare.errors import SettingsError
from pytest_gpushare.place import entered
from pytest_gpushare.plan.model import Request
from pytest_gpushare.run import numprocesses
from pytest_gpushare.run.others import Others
from pytest_gpushare.run.placement import worker_environment
from pytest_gpushare.run.places import place_of
from pytest_gpushare.run.process import cuda_is_up, set_variables
from pytest_gpushare.run.start import Host, start
from pytest_gpushare.run.started import LeftAlone, Started
from pytest_gpushare.settings.gpu_auto import has_xdist, runs_tests
from pytest_gpushare.settings.load import load
from pytest_gpushare.settings.reports import report_files
from pytest_gpushare.settings.values import Settings
from pytest_gpushare.settings.written import gather

if TYPE_CHECKING:
    import pytest


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
    own_workers = numprocesses.keeps_own_workers(options)
    if own_workers and not numprocesses.local_workers(options.tx):
        why = "the workers of --tx are on other hosts: no GPU is assigned to them"
        return LeftAlone(f"{why}, and no report is written" if options.gpu_share_report else why)
    reports = _reports(config, options)
    request, cpus = numprocesses.request_for(config)
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
        from pytest_gpushare.run.preloading import check

        check(settings)
        return replace(settings, ollama_preload=False)
    return settings


def _reports(config: pytest.Config, options: Any) -> tuple[Path, ...]:
    return report_files(options.gpu_share_report, Path(config.invocation_params.dir))


def _seen(settings: Settings, config: pytest.Config) -> Mapping[str, int]:
    if not settings.ollama_models:
        return {}
    from pytest_gpushare.run.learned import recall

    return recall(config)


def attach(started: Started | LeftAlone, config: pytest.Config) -> None:
    """What runs beside the tests of a run that has GPU workers: pytest's cache is there by now."""
    from pytest_gpushare.run.context import known

    started.recall(known(config))
    if isinstance(started, Started) and started.plan.slots and not started.gpus.simulated:
        from pytest_gpushare.run.alone import Alone
        from pytest_gpushare.run.lessons import may_have_needs
        from pytest_gpushare.run.profile import Profile

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
