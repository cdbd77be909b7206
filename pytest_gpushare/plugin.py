"""pytest's hooks in the controller, and the options of the command line.

Imported in every run of pytest. A run that did not ask for the plugin needs the names and the
help of the options, and nothing else: whatever else is needed is imported where it is used.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpushare.compat.pytest_options import early_options, runs_tests, set_usage_hint
from pytest_gpushare.compat.xdist_options import (
    GPU_AUTO,
    accept_gpu_auto,
    announce_workers,
    asks_for_gpu_auto,
    asks_for_hosts,
    given_number,
    is_in_process,
    keeps_own_workers,
    set_number,
)
from pytest_gpushare.config.options import OPTIONS, SWITCHES

if TYPE_CHECKING:
    from pytest_gpushare.place import Place
    from pytest_gpushare.report.output import Header
    from pytest_gpushare.report.results import Results
    from pytest_gpushare.session.run import ActiveRun
    from pytest_gpushare.worker.ollama_fixture import OllamaForTest

RUN: pytest.StashKey[ActiveRun] = pytest.StashKey()
"""The active run; absent where the plugin is not asked for, and where it leaves the run alone."""
LEFT_OUT: pytest.StashKey[str] = pytest.StashKey()
"""Why a run that asked for the plugin is left as it is."""
BEFORE_CONFTESTS: pytest.StashKey[dict[str, str]] = pytest.StashKey()
"""The environment after the plugins were loaded and before the conftests are."""
_CAPS_AFTER_IMPORT = ("PYTEST_GPUSHARE_TORCH_FRACTION", "PYTEST_GPUSHARE_TENSORFLOW_MB")
"""The variables of the caps that wait for a framework's import; see `worker.framework_caps`."""


class _Early:
    """The part that needs the parser, or must come after the hooks of most other plugins."""

    def __init__(self, parser: pytest.Parser) -> None:
        self._parser = parser

    def pytest_plugin_registered(self, plugin: object) -> None:
        """Extend xdist's `-n`, whichever of the two plugins is loaded first."""
        if getattr(plugin, "__name__", None) == "xdist.plugin":
            accept_gpu_auto(self._parser)
            set_usage_hint(self._parser, "pytest-gpushare", None)

    def pytest_load_initial_conftests(self, early_config: pytest.Config) -> None:
        """Place this process, where it runs the tests itself, before a conftest is imported.

        No wrapper and not first, so that variables count which plugins such as pytest-env set.
        """
        early_config.stash[BEFORE_CONFTESTS] = dict(os.environ)
        options = _options_if_asked(early_config)
        if options is not None and is_in_process(options):
            from pytest_gpushare.session.start import start_in_process

            environment = early_config.stash[BEFORE_CONFTESTS]
            _activate(early_config, _checked(start_in_process, early_config, environment))
        if any(os.environ.get(name) for name in _CAPS_AFTER_IMPORT):
            from pytest_gpushare.worker.framework_caps import cap_after_import

            early_config.add_cleanup(cap_after_import())


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Register the options of the table; all are unset by default, so that precedence holds."""
    group = parser.getgroup("gpu-share", "GPU workers next to Ollama (pytest-gpushare)")
    for flag, action, meaning, rest in SWITCHES:
        group.addoption(flag, action=action, default=None, help=meaning, **rest)
    parser.addini("gpu_share", "size the xdist workers by VRAM (pytest-gpushare)", default=None)
    for option in OPTIONS:
        parser.addini(option.ini, option.meaning, default=None)
        if option.flag:
            group.addoption(
                option.flag,
                action="append" if option.repeatable else "store",
                default=None,
                metavar=option.metavar,
                dest=option.ini,
                help=option.meaning.replace("%", "%%"),
            )
    # pytest prints this under "unrecognized arguments", which is what -n is without xdist.
    set_usage_hint(parser, "pytest-gpushare", "-n gpu-auto needs pytest-xdist")
    pluginmanager.register(_Early(parser), "gpu-share-early")


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Register the hooks by which others add devices and change the plan."""
    from pytest_gpushare import hookspecs

    pluginmanager.add_hookspecs(hookspecs)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None, None, None]:
    """Announce the workers before other plugins ask here whether there are any."""
    options = _options_if_asked(early_config)
    if options is not None and not is_in_process(options):
        announce_workers(options)
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, Any, Any]:
    """Write the number of workers before xdist reads it."""
    # Only workerinput proves a worker: nested runs inherit every environment variable.
    if not hasattr(config, "workerinput"):
        if not _is_asked(config, config.option):
            _report_unused_options(config)
        elif RUN not in config.stash:
            before = config.stash.get(BEFORE_CONFTESTS, None)
            _activate(config, _checked(_start_of(config), config, before))
        # xdist does not know gpu-auto: --no-gpu-share makes it auto, a run without workers 0.
        if asks_for_gpu_auto(config.option):
            set_number(config.option, "auto" if config.option.gpu_share is False else 0)
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the marker; in a worker of an active run begin its part."""
    # Suites with --strict-markers run without --gpu-share too; a wrong value is reported where
    # the plugin is asked for.
    marker = "gpu"
    with contextlib.suppress(Exception):
        marker = config.getini("gpu_share_marker") or marker
    config.addinivalue_line(
        "markers",
        f"{marker}(vram=..., devices=..., exclusive=..., "
        "required=...): a test that needs a GPU (pytest-gpushare)",
    )
    config.addinivalue_line(
        "markers",
        "ollama(model=..., context=...): a test that uses a model of Ollama's (pytest-gpushare)",
    )
    if hasattr(config, "workerinput"):
        from pytest_gpushare import wire

        if message := config.workerinput.get(wire.PLACEMENT):
            from pytest_gpushare.worker import plugin as worker_plugin

            _checked(worker_plugin.begin, config, message)


@pytest.fixture
def ollama(request: pytest.FixtureRequest) -> OllamaForTest:
    """Ollama for a test that uses a model: base_url, openai_base_url, model, context, options."""
    from pytest_gpushare.worker.ollama_fixture import ollama_for

    return ollama_for(request)


@pytest.fixture(scope="session")
def gpu_share() -> Place:
    """Where this process was placed: role, device, VRAM in bytes, and the run's plan."""
    from pytest_gpushare.place import current

    return current()


class _HeaderHooks:
    """Print the header of a run that asked for the plugin."""

    def __init__(self, header: Header, *, has_summary: bool) -> None:
        self._header, self._has_summary = header, has_summary

    def pytest_report_header(self, config: pytest.Config) -> list[str]:
        """The VRAM analysis, or why the run is left as it is."""
        from pytest_gpushare.report.output import header_lines

        return header_lines(self._header, config)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """The same lines for the log, and the problems for a run that prints no header."""
        from pytest_gpushare.report.output import log_header, print_problems

        log_header(self._header, session.config)
        print_problems(self._header, session.config, has_summary=self._has_summary)


class _RunHooks:
    """The hooks of an active run; registered in no other."""

    def __init__(self, run: ActiveRun) -> None:
        self._run = run
        self._results: Results | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Follow the tests; where this process runs them, begin a worker's part too."""
        from pytest_gpushare.report.output import progress
        from pytest_gpushare.session.start import observe

        run = self._run
        observe(run, config, progress(config))
        if message := run.message_to_itself():
            from pytest_gpushare.worker.in_process import begin_in_process

            begin_in_process(run, config, message)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> Generator[None, Any, Any]:
        """Start the services last: by then xdist has started the workers."""
        result = yield
        self._run.services.start()
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None and reporter.isatty:
            from pytest_gpushare.report import live_line

            live_line.begin(self._run, session.config)
        return result

    @pytest.hookimpl(optionalhook=True, wrapper=True, tryfirst=True)
    def pytest_xdist_setupnodes(self, specs: list[Any]) -> Generator[None, Any, Any]:
        """Give each worker its device; only `spec.env` is there before its first import."""
        # Again after the other hooks: one may have assigned an environment of its own.
        self._run.place(specs)
        result = yield
        self._run.place(specs)
        return result

    @pytest.hookimpl(optionalhook=True, wrapper=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config) -> Generator[None, Any, Any]:
        """Schedule GPU tests by VRAM, where there is something to route; else as xdist does."""
        stock = yield
        from pytest_gpushare.dispatch.distribution import scheduler_for

        return scheduler_for(self._run, config, stock)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Send each worker its place, and open a channel to it."""
        run = self._run
        if message := run.message_to(node.gateway.spec):
            from pytest_gpushare import wire

            channel = run.links.open(node.gateway.newchannel(), node.gateway.id)
            node.workerinput[wire.PLACEMENT] = {**message, "channel": channel}
            run.joined(node.gateway.id, message)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Close the channel to a worker, and keep what it measured; a crashed one sent nothing."""
        from pytest_gpushare import wire

        self._run.links.close(node.gateway.id)
        self._run.gone(node.gateway.id, in_order=hasattr(node, "workeroutput"))
        measured = getattr(node, "workeroutput", {}).get(wire.CONTEXT)
        if measured:
            from pytest_gpushare.session.needs_store import keep_context

            keep_context(node.config, *measured)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, Any, Any]:
        """End what ran beside the tests; under --gpu-share-strict what went wrong fails the run."""
        run = self._run
        # The workers' processes are there only until xdist's own part of this hook.
        run.read_workers_now()
        try:
            return (yield)
        finally:
            run.end()
            run.model_sizes.keep(session.config)
            if run.has_failed() and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
            from pytest_gpushare.report.publish import publish

            publish(self._make_results(), session.config, int(session.exitstatus))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """What the tests used, and what went wrong on the way."""
        from pytest_gpushare.report.publish import print_summary

        print_summary(self._make_results(), terminalreporter)

    def _make_results(self) -> Results:
        """What the run left, made once, when its tests are over.

        Not a property: older versions of pytest read those of a plugin when they register it.
        """
        from pytest_gpushare.report.results import Results

        if self._results is None:
            self._results = Results(self._run)
        return self._results


def _options_if_asked(early_config: pytest.Config) -> Any | None:
    """The options of a run of tests that asked for the plugin, before conftests are loaded."""
    options = early_options(early_config)
    if options is None or not runs_tests(options) or not _is_asked(early_config, options):
        return None
    return options


def _start_of(config: pytest.Config) -> Callable[..., ActiveRun | str | None]:
    """What starts the run: here, or on several hosts."""
    if _names_hosts(config):
        from pytest_gpushare.hosts.launch import start_on_hosts

        return start_on_hosts
    from pytest_gpushare.session.start import start_workers

    return start_workers


def _names_hosts(config: pytest.Config) -> bool:
    options = config.option
    if given_number(options) not in (None, GPU_AUTO):
        return False
    if keeps_own_workers(options):
        return asks_for_hosts(options)
    with contextlib.suppress(Exception):
        return bool(config.getini("gpu_share_hosts"))
    return False


def _is_asked(config: pytest.Config, options: Any) -> bool:
    if options.gpu_share is not None:
        return bool(options.gpu_share)
    if asks_for_gpu_auto(options) or asks_for_hosts(options):
        return True
    # getini refuses a typed value of pytest 9's TOML; the reader below takes it.
    with contextlib.suppress(Exception):
        if config.getini("gpu_share") is None:
            return False
    from pytest_gpushare.config.sources import switched_on

    return bool(_checked(switched_on, config))


def _report_unused_options(config: pytest.Config) -> None:
    """Options that make no sense without the switch, where they were typed."""
    options = config.option
    ours = (value for name, value in vars(options).items() if name.startswith("gpu_share_"))
    if options.gpu_share is None and any(ours):
        from pytest_gpushare.config.sources import unused_options

        if runs_tests(options) and (text := _checked(unused_options, config)):
            try:
                config.issue_config_time_warning(pytest.PytestConfigWarning(text), stacklevel=2)
            except pytest.PytestConfigWarning as error:
                raise pytest.UsageError(str(error)) from None


def _activate(config: pytest.Config, run: ActiveRun | str | None) -> None:
    """Register the hooks of a run; of one that is left as it is, for a reason, the header's."""
    if run is None:
        return
    from functools import partial

    from pytest_gpushare.report.header import header, left_out

    if isinstance(run, str):
        config.stash[LEFT_OUT] = run
        lines = partial(left_out, run)
    else:
        config.stash[RUN] = run
        config.add_cleanup(run.close)
        config.add_cleanup(run.end)
        lines = partial(header, run)
        config.pluginmanager.register(_RunHooks(run), "gpu-share-run")
    hooks = _HeaderHooks(lines, has_summary=not isinstance(run, str))
    config.pluginmanager.register(hooks, "gpu-share-header")


def _checked(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function; our errors become pytest's, without a traceback (exit code 4)."""
    from pytest_gpushare.errors import GpuShareError

    try:
        return function(*arguments)
    except GpuShareError as error:
        raise pytest.UsageError(str(error)) from None
    except KeyboardInterrupt:
        # Before pytest's own session nobody catches it; loading a model may take minutes.
        sys.stderr.write("gpu-share: interrupted before the tests\n")
        raise SystemExit(pytest.ExitCode.INTERRUPTED) from None
