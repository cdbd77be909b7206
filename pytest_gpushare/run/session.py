"""The start of a pytest run: settings, probe and plan, then `-n` and the workers' places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_gpushare.errors import SettingsError
from pytest_gpushare.plan.model import Request
from pytest_gpushare.run import numprocesses
from pytest_gpushare.run.placement import cuda_is_up, place_this_process
from pytest_gpushare.run.start import LeftAlone, Started, start
from pytest_gpushare.settings.gpu_auto import GPU_AUTO
from pytest_gpushare.settings.load import load
from pytest_gpushare.settings.written import gather

if TYPE_CHECKING:
    import pytest


def start_in_process(config: pytest.Config) -> Started | None:
    """Place this process where it runs the tests itself; None in any other run.

    Called before the first conftest, as CUDA reads its visibility once.
    """
    options = config.known_args_namespace
    if not numprocesses.has_xdist(options) and options.gpu_share:
        raise SettingsError(
            "--gpu-share sizes the workers of pytest-xdist, which is not loaded: install "
            "pytest-xdist, or drop -p no:xdist"
        )
    if not numprocesses.runs_tests(options) or not numprocesses.is_in_process(options):
        return None
    started = start(load(gather(config)), Request(in_process=True), _simulate(options), 1)
    if cuda_is_up(started.gpus.own_process_has_context):
        started.placed = False
    else:
        config.add_cleanup(place_this_process(started.plan, simulated=started.gpus.simulated))
    return started


def start_workers(config: pytest.Config) -> Started | LeftAlone | None:
    """Write the number of workers into xdist's option; None where no test is run."""
    options = config.option
    if not numprocesses.runs_tests(options):
        settle_in_process(config)
        return None
    own_workers = numprocesses.keeps_own_workers(options)
    if own_workers and not numprocesses.local_workers(options.tx):
        return LeftAlone("the workers of --tx are on other hosts: no GPU is assigned to them")
    request, cpus = numprocesses.request_for(config)
    started = start(load(gather(config)), request, _simulate(options), cpus)
    plan = started.plan
    if not own_workers:
        options.numprocesses = plan.workers
    if options.dist == "each":
        started.notes.append(
            f"--dist=each: every test runs on each of the {plan.workers} workers: "
            "use --dist=load to share them out"
        )
    return started


def settle_in_process(config: pytest.Config) -> None:
    """Leave no word in xdist's option where xdist expects a number, in a run without workers."""
    if getattr(config.option, "numprocesses", None) == GPU_AUTO:
        config.option.numprocesses = 0


def _simulate(options: Any) -> tuple[str, ...]:
    return tuple(options.gpu_share_simulate or ())
