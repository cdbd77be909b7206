"""The hooks of pytest and xdist: each translates and calls; nothing is decided here.

Imported in every run of pytest, so only what an idle run needs is imported at the top.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpushare import wire
from pytest_gpushare.compat.xdist_options import (
    GPU_AUTO,
    accept_gpu_auto,
    announce_workers,
    is_in_process,
    runs_tests,
)
from pytest_gpushare.config.options import OPTIONS
from pytest_gpushare.worker import plugin as worker_plugin

if TYPE_CHECKING:
    from pytest_gpushare.place import Place
    from pytest_gpushare.report.summary import Line
    from pytest_gpushare.session.run import ActiveRun


class _NumprocessesType:
    """Teaches xdist's `-n` the word `gpu-auto`, whichever of the two plugins loads first."""

    def __init__(self, parser: pytest.Parser) -> None:
        self._parser = parser

    def pytest_plugin_registered(self, plugin: object) -> None:
        if getattr(plugin, "__name__", None) == "xdist.plugin":
            accept_gpu_auto(self._parser)
            self._parser.extra_info.pop("pytest-gpushare", None)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Register the options of the table; all are unset by default, so that precedence holds."""
    group = parser.getgroup("gpu-share", "GPU workers beside Ollama (pytest-gpushare)")
    group.addoption(
        "--gpu-share",
        action="store_true",
        default=None,
        dest="gpu_share",
        help="size the xdist workers by the VRAM that Ollama and others leave (also: -n gpu-auto)",
    )
    group.addoption(
        "--no-gpu-share",
        action="store_false",
        default=None,
        dest="gpu_share",
        help="do not, whatever the ini file says; -n gpu-auto then means -n auto",
    )
    group.addoption(
        "--gpu-share-strict",
        action="store_true",
        default=False,
        dest="gpu_share_strict",
        help="fail the run (exit code 1) where a worker's placement was changed behind the plan, "
        "or the tests drove a part of a model of Ollama's off the GPU",
    )
    group.addoption(
        "--gpu-share-simulate",
        action="append",
        default=None,
        metavar="SPEC",
        dest="gpu_share_simulate",
        help="a what-if device in place of the real ones, such as 24GB:used=2GB (repeatable)",
    )
    group.addoption(
        "--gpu-share-report",
        action="append",
        default=None,
        metavar="FILE",
        dest="gpu_share_report",
        help="write what happened to FILE.json or FILE.html after the tests (repeatable)",
    )
    parser.addini("gpu_share", "size the xdist workers by VRAM (pytest-gpushare)", default=None)
    for option in OPTIONS:
        parser.addini(option.ini, option.meaning, default=None)
        if option.flag:
            group.addoption(
                option.flag,
                action="append" if option.kind == "words" else "store",
                default=None,
                metavar=option.metavar,
                dest=option.ini,
                help=option.meaning.replace("%", "%%"),
            )
    # pytest prints this under "unrecognized arguments", which is what -n is without xdist.
    parser.extra_info["pytest-gpushare"] = "-n gpu-auto needs pytest-xdist"
    pluginmanager.register(_NumprocessesType(parser), "gpu-share-numprocesses-type")


def told_of_report(config: pytest.Config) -> list[str] | None:
    """A report that was asked for in a run that did not ask for the plugin."""
    options = config.option
    if not options.gpu_share_report or getattr(options, "collectonly", False):
        return None
    return ["gpu-share: no report is written: it needs --gpu-share"]


OUTER: pytest.StashKey[dict[str, str]] = pytest.StashKey()
RUN: pytest.StashKey[ActiveRun] = pytest.StashKey()
"""The active run; absent where the plugin is not asked for, and where it leaves the run alone."""
LEFT_OUT: pytest.StashKey[str] = pytest.StashKey()
"""Why a run that asked for the plugin is left as it is: for the header."""


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """The hooks by which others add devices and have a last word on the plan."""
    from pytest_gpushare import hookspecs as hooks

    pluginmanager.add_hookspecs(hooks)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None, None, None]:
    """Where this process itself runs the tests, place it before any conftest is imported.

    A wrapper, so that it comes before other plugins that ask here whether there are workers.
    """
    # A conftest may change what its own process sees; the plan goes by what the user set.
    early_config.stash[OUTER] = dict(os.environ)
    options = early_config.known_args_namespace
    if _is_asked(early_config, options) and runs_tests(options):
        if is_in_process(options):
            from pytest_gpushare.session.start import start_in_process

            _hold(early_config, _call(start_in_process, early_config, early_config.stash[OUTER]))
        else:
            announce_workers(options)
    if any(os.environ.get(name) for name in worker_plugin.HOOKS):
        early_config.add_cleanup(worker_plugin.cap_after_import())
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, Any, Any]:
    """Write the number of workers before xdist reads it."""
    # Only workerinput proves a worker: nested runs inherit every environment variable.
    if not hasattr(config, "workerinput"):
        if _is_asked(config, config.option) and RUN not in config.stash:
            from pytest_gpushare.session.start import start_workers

            outer = config.stash.get(OUTER, os.environ)
            _hold(config, _call(start_workers, config, outer))
        # xdist knows no gpu-auto: with --no-gpu-share it means auto, in a run without workers 0.
        if getattr(config.option, "numprocesses", None) == GPU_AUTO:
            config.option.numprocesses = "auto" if config.option.gpu_share is False else 0
    return (yield)


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Give each worker its device; only `spec.env` is there before its first import."""
    run = config.stash.get(RUN, None)
    if run is not None:
        run.place(specs)


@pytest.hookimpl(optionalhook=True, wrapper=True)
def pytest_xdist_make_scheduler(config: pytest.Config) -> Generator[None, Any, Any]:
    """Schedule GPU tests by VRAM, where there is something to route; else as xdist does."""
    stock = yield
    run = config.stash.get(RUN, None)
    if run is None:
        return stock
    from pytest_gpushare.dispatch.distribution import scheduler_for
    from pytest_gpushare.worker.runner import report_lost

    return scheduler_for(run, config, stock, partial(report_lost, config))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell each worker that the plugin is active in its controller."""
    run = node.config.stash.get(RUN, None)
    if run is not None and (message := run.message_to(node.gateway.spec)):
        channel = run.links.open(node.gateway.newchannel(), node.gateway.id)
        node.workerinput[wire.PLACED] = {**message, "channel": channel}
        run.joined(node.gateway.id, message)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Close the link to a worker, and keep what it measured; a crashed one has nothing to say."""
    run = node.config.stash.get(RUN, None)
    if run is None:
        return
    run.links.close(node.gateway.id)
    run.gone(node.gateway.id)
    measured = getattr(node, "workeroutput", {}).get(wire.CONTEXT)
    if measured:
        from pytest_gpushare.session.needs_store import keep_context

        keep_context(node.config, *measured)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """The marker; in a process that was placed its place, its log, and a watch over both."""
    # Suites with --strict-markers run without --gpu-share too.
    marker = "gpu"
    # A value that makes no sense is told where the plugin is asked for, and only there.
    with contextlib.suppress(Exception):
        marker = config.getini("gpu_share_marker") or marker
    config.addinivalue_line(
        "markers",
        f"{marker}(vram=..., devices=..., exclusive=..., "
        "required=...): a test that needs a GPU (pytest-gpushare)",
    )
    message = getattr(config, "workerinput", {}).get(wire.PLACED)
    if message:
        _call(worker_plugin.begin, config, message)
        return
    run = config.stash.get(RUN, None)
    if run is not None:
        from pytest_gpushare.report.output import progress
        from pytest_gpushare.session.start import observe

        observe(run, config, progress(config))
    if run is not None and (own := run.message_to_itself()):
        link = wire.Link(partial(run.links.receive, wire.ITSELF))
        run.links.attach(wire.ITSELF, link.receive)
        run.joined(wire.ITSELF, own)
        config.pluginmanager.register(worker_plugin.Placed(own, link), "gpu-share-placed")
        worker_plugin.follow(config, own["tests"], link)
        worker_plugin.watch_memory(config, own, link)


def pytest_report_header(config: pytest.Config) -> list[str] | None:
    """The VRAM analysis; nothing in a run that did not ask."""
    lines = _header(config)
    if lines is None:
        return told_of_report(config)
    from pytest_gpushare.report.output import header_lines

    return header_lines(lines, config)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> Generator[None, Any, Any]:
    """The same lines for the log, and the problems for a run that prints no header.

    The services start last: by then xdist has started the workers.
    """
    lines = _header(session.config)
    if lines is not None:
        from pytest_gpushare.report.output import log_header, print_problems

        log_header(lines, session.config)
        print_problems(lines, session.config)
    result = yield
    run = session.config.stash.get(RUN, None)
    if run is not None:
        run.services.start()
    return result


def _header(config: pytest.Config) -> Callable[[int], list[Line]] | None:
    """The lines of the header, by verbosity; None in a run that did not ask."""
    run, reason = config.stash.get(RUN, None), config.stash.get(LEFT_OUT, "")
    if run is None and not reason:
        return None
    from pytest_gpushare.report.header import header, left_out

    return partial(left_out, reason) if run is None else partial(header, run)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, Any, Any]:
    """End what ran beside the tests; under --gpu-share-strict what went wrong fails the run.

    A wrapper, as the workers' processes are there only until xdist's own part of this.
    """
    run = session.config.stash.get(RUN, None)
    if run is None:
        return (yield)
    run.look_again()
    try:
        return (yield)
    finally:
        run.end()
        run.model_sizes.keep(session.config)
        if run.has_failed() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        from pytest_gpushare.report.output import log_summary, publish

        publish(run, session.config, int(session.exitstatus))
        log_summary(run, session.config)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What went wrong on the way; nothing where nothing did."""
    run = terminalreporter.config.stash.get(RUN, None)
    if run is not None:
        from pytest_gpushare.report.output import print_summary

        print_summary(run, terminalreporter)


@pytest.fixture(scope="session")
def gpu_share() -> Place:
    """Where this process was placed: role, device, VRAM in bytes, and the run's plan."""
    from pytest_gpushare.place import current

    return current()


def _is_asked(config: pytest.Config, options: Any) -> bool:
    if options.gpu_share is not None:
        return bool(options.gpu_share)
    if getattr(options, "numprocesses", None) == GPU_AUTO:
        return True
    # getini refuses a typed value of pytest 9's TOML; the reader below takes it.
    with contextlib.suppress(Exception):
        if config.getini("gpu_share") is None:
            return False
    from pytest_gpushare.config.sources import switched_on

    return bool(_call(switched_on, config))


def _hold(config: pytest.Config, run: ActiveRun | str | None) -> None:
    if isinstance(run, str):
        config.stash[LEFT_OUT] = run
    elif run is not None:
        config.stash[RUN] = run
        config.add_cleanup(run.close)
        config.add_cleanup(run.end)


def _call(function: Any, *arguments: Any) -> Any:
    """Call into the house; its errors become pytest's, without a traceback (exit code 4)."""
    from pytest_gpushare.errors import GpuShareError

    try:
        return function(*arguments)
    except GpuShareError as error:
        raise pytest.UsageError(str(error)) from None
    except KeyboardInterrupt:
        # Before pytest's own session nobody catches it; loading a model may take minutes.
        sys.stderr.write("gpu-share: interrupted before the tests\n")
        raise SystemExit(pytest.ExitCode.INTERRUPTED) from None
