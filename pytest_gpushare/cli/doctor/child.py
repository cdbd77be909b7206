"""The child process of doctor: prints what pytest reads in this directory as one line of JSON.

A process of its own, since importing other plugins may fail or hang. No conftest is imported,
nothing is probed, no test is collected.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

from pytest_gpushare.cli.doctor.examine import MARK
from pytest_gpushare.cli.plan_command import ask_pytest
from pytest_gpushare.compat.xdist_hosts import given_specs
from pytest_gpushare.compat.xdist_options import GPU_AUTO, asks_for_hosts, has_xdist
from pytest_gpushare.config.sources import gather, switched_on
from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.session.start import request_for

if TYPE_CHECKING:
    import pytest


def main(arguments: list[str]) -> int:
    """Print what pytest found."""

    def look(config: pytest.Config) -> int:
        print(MARK + json.dumps(_found(config), default=str))  # noqa: T201
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
