"""pytest started up to its plan, with its own configuration and plugins, and without a test.

pytest itself resolves precedence, root directory, `addopts` and other plugins, so that the plan
which `pytest-gpushare plan` shows is the one of a real run. Doctor and watch have a child process
read the configuration, since importing other plugins may fail or hang: no conftest is imported
there, nothing is probed, and the answer is one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pytest_gpushare.cli.terminal import (
    OK,
    REFUSED,
    Piece,
    Row,
    show,
    show_json,
    terminal_width,
)
from pytest_gpushare.compat.xdist_hosts import given_specs
from pytest_gpushare.compat.xdist_options import GPU_AUTO, asks_for_hosts, has_xdist
from pytest_gpushare.config.settings import Settings
from pytest_gpushare.config.sources import Written, gather, load, switched_on
from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.planning.plan import Request
from pytest_gpushare.report.header import header, left_out
from pytest_gpushare.report.output import Line, laid_out
from pytest_gpushare.session.start import request_for

ALWAYS = (
    "-p",
    "pytest_gpushare.plugin",
    "-W",
    "ignore::pytest.PytestAssertRewriteWarning",
)
"""Arguments that load the plugin also where entry points are switched off; loading it twice is
harmless. pytest warns that the package was imported before it could be rewritten, which is an
error under `filterwarnings = error`: that warning is ignored."""

Look = Callable[[pytest.Config], int]


class _Stop:
    """Ends pytest once the plan is made, before a session starts."""

    gpu_share_only_asks = True
    """Read by the plugin: no test will follow, so Ollama loads no model."""

    def __init__(self, look: Look, cpus: int | None) -> None:
        self._look = look
        self._cpus = cpus
        self._stdout = sys.stdout

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> int:
        """Call `look` inside the plugin's own wrapper of this hook: the plan is made by then."""
        _drop_captured(config)
        with contextlib.redirect_stdout(self._stdout):
            return self._look(config)

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_xdist_auto_num_workers(self) -> int | None:
        """The number of CPUs given by --cpus."""
        return self._cpus


def ask_pytest(arguments: Sequence[str], look: Look, cpus: int | None = None) -> int:
    """Start pytest up to the plan and call `look` with its config. Returns the exit code.

    Output of conftests and plugins goes to standard error. There pytest reports wrong settings
    in one line; the exit code is then pytest's.
    """
    stop = _Stop(look, cpus)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            return int(pytest.main([*ALWAYS, *arguments], plugins=[stop]))
    finally:
        sys.stderr.write(_without_usage(output.getvalue()))


def _without_usage(output: str) -> str:
    """The output; where pytest printed its usage, the line with the error alone."""
    usage = re.search(r"(?ms)^ERROR: usage: .*?^\S+: error: ([^\n]*)", output)
    return f"ERROR: {usage[1]}\n" if usage else re.sub(r"\n+\Z", "\n", output)


def _drop_captured(config: pytest.Config) -> None:
    """Discard what conftests printed; pytest would show it when its capture ends without a run."""
    capture = config.pluginmanager.get_plugin("capturemanager")
    with contextlib.suppress(Exception):
        if capture is not None:
            capture.read_global_capture()


def plan(options: argparse.Namespace) -> int:
    """Print the plan. Returns the exit code."""

    def look(config: pytest.Config) -> int:
        from pytest_gpushare.plugin import LEFT_OUT, RUN

        run, reason = config.stash.get(RUN, None), config.stash.get(LEFT_OUT, "")
        if run is None and not reason:
            raise GpuShareError(
                "these arguments run no test under the plugin: remove --no-gpu-share, "
                "--collect-only and the like"
            )
        if options.json:
            from pytest_gpushare.report.document import left_out_document, plan_document

            show_json(left_out_document(reason) if run is None else plan_document(run))
        else:
            show(_rows(left_out(reason) if run is None else header(run, options.verbosity)))
        return OK

    code = ask_pytest(_arguments(options), look, options.cpus)
    return code if code == OK else REFUSED


def _arguments(options: argparse.Namespace) -> list[str]:
    """pytest's arguments: the options under pytest's names, then those after `--`."""
    result = ["--gpu-share"]
    for name, values in (
        ("--gpu-share-simulate", options.simulate),
        ("--gpu-share-preset", options.preset),
        ("--gpu-share-config", [options.config] if options.config is not None else []),
        ("--override-ini", options.override),
    ):
        result += [f"{name}={value}" for value in values]
    if options.number is not None:
        result.append(f"-n{options.number}")
    return [*result, *options.pytest_arguments]


def _rows(lines: Sequence[Line]) -> Iterator[Row]:
    width = terminal_width()
    for line in lines if width is None else laid_out(lines, width):
        yield [Piece(line.text, line.colour)]


TIMEOUT = 30.0
"""Seconds that pytest may take to start, without conftests and tests."""

_MARK = "pytest-gpushare found: "
"""The start of the line with the answer; plugins may print other lines."""


@dataclass(frozen=True)
class PytestView:
    """What pytest reads in this directory."""

    error: str = ""
    """Why there is no answer."""
    written: Written | None = None
    configuration: str = ""
    """The configuration file; empty: none."""
    root: str = ""
    switched_on: bool = False
    """Whether `gpu_share = true` stands in the configuration."""
    wrong_switch: str = ""
    asked_by_arguments: bool = False
    """Whether `addopts` or PYTEST_ADDOPTS ask for the plugin."""
    strict: bool = False
    xdist: bool = True
    """Whether pytest loaded xdist."""
    anyio: bool = False
    """Whether pytest loaded the plugin of anyio."""
    autoload: bool = True
    request: Request = field(default_factory=Request)
    cpus: int | None = None
    named_hosts: Sequence[str] = ()
    """The specs of `--tx gpu-auto*...`."""


def pytest_view(arguments: Sequence[str]) -> PytestView:
    """Have a child process read pytest's configuration, within `TIMEOUT`. Never raises."""
    command = [sys.executable, "-m", "pytest_gpushare.cli.plan_command", *arguments]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return PytestView(f"pytest did not start within {TIMEOUT:g} s")
    except OSError as error:
        return PytestView(f"Python cannot be started: {error.strerror or error}")
    for line in done.stdout.splitlines():
        if _MARK in line:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                return _view(json.loads(line.partition(_MARK)[2]))
    return PytestView(_complaint(done.stderr) or f"pytest ended with code {done.returncode}")


def _view(found: Mapping[str, Any]) -> PytestView:
    written = dict(found["written"])
    for name in ("root", "ini_directory", "invocation_directory"):
        written[name] = Path(written[name])
    return PytestView(
        **{**found, "written": Written(**written), "request": Request(**found["request"])}
    )


def _complaint(text: str) -> str:
    """The most telling line: pytest's `ERROR: ...`, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines[-1:] or [""])[0][:400]


def main(arguments: list[str]) -> int:
    """Print what pytest found."""

    def look(config: pytest.Config) -> int:
        print(_MARK + json.dumps(_found(config), default=str))  # noqa: T201
        return 0

    return ask_pytest(["--noconftest", *arguments, "--no-gpu-share"], look)


def _found(config: pytest.Config) -> dict[str, Any]:
    try:
        switch, wrong = switched_on(config), ""
    except GpuShareError as error:
        switch, wrong = False, str(error)
    arguments = _added(config)
    by_number = any(word.endswith(GPU_AUTO) for word in arguments)
    request, cpus = request_for(config)
    if by_number:
        # --no-gpu-share, added above, has turned gpu-auto into xdist's number.
        request = request._replace(number=None)
    return {
        "written": {name: _plain(value) for name, value in gather(config)._asdict().items()},
        "configuration": str(config.inipath or ""),
        "root": str(config.rootpath),
        "switched_on": switch,
        "wrong_switch": wrong,
        "asked_by_arguments": by_number or "--gpu-share" in arguments,
        "strict": _is_strict(config),
        "xdist": has_xdist(config.option),
        "anyio": config.pluginmanager.hasplugin("anyio"),
        "autoload": not os.environ.get("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
        and not getattr(config.option, "disable_plugin_autoload", False),
        "request": request._asdict(),
        "cpus": cpus,
        "named_hosts": given_specs(config.option) if asks_for_hosts(config.option) else [],
    }


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, dict) else str(value)


def _added(config: pytest.Config) -> list[str]:
    """The arguments in `addopts` and PYTEST_ADDOPTS."""
    try:
        return [*config.getini("addopts"), *shlex.split(os.environ.get("PYTEST_ADDOPTS", ""))]
    except ValueError:
        return []


def _is_strict(config: pytest.Config) -> bool:
    """Whether pytest refuses unknown ini keys."""
    options = config.option
    if getattr(options, "strict_config", False) or getattr(options, "strict", False):
        return True
    for name in ("strict_config", "strict"):
        # These keys exist since pytest 9.
        try:
            if config.getini(name):
                return True
        except (ValueError, KeyError):
            continue
    return False


def settings_of(view: PytestView) -> tuple[Settings, str]:
    """The settings in force, or the defaults and what is wrong with the settings."""
    error = view.wrong_switch
    if view.written is not None:
        try:
            return load(view.written), error
        except GpuShareError as refused:
            error = error or str(refused)
    return load(_nothing_written()), error


def _nothing_written() -> Written:
    here = Path()
    # No JSON file either.
    return Written({}, {"gpu_share_config": ""}, {}, "", here, here, here)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
