"""What pytest reads in this directory: a question to a child process, and the child's answer.

A process of its own, since importing other plugins may fail or hang. No conftest is imported,
nothing is probed, no test is collected; the answer is one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpushare.cli.plan_command import ask_pytest
from pytest_gpushare.compat.xdist_hosts import given_specs
from pytest_gpushare.compat.xdist_options import GPU_AUTO, asks_for_hosts, has_xdist
from pytest_gpushare.config.sources import Written, gather, switched_on
from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.planning.plan import Request
from pytest_gpushare.session.start import request_for

if TYPE_CHECKING:
    import pytest

TIMEOUT = 30.0
"""Seconds that pytest may take to start, without conftests and tests."""

_MARK = "pytest-gpushare found: "
"""The start of the line with the answer; plugins may print other lines."""


@dataclass(frozen=True)
class PytestView:
    """What pytest found."""

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


def ask(arguments: Sequence[str]) -> PytestView:
    """Have a child process read pytest's configuration, within `TIMEOUT`. Never raises."""
    command = [sys.executable, "-m", "pytest_gpushare.cli.doctor.project_view", *arguments]
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
