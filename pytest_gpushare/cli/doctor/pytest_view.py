"""What pytest reads in this directory, found out in a process of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_gpushare.plan.model import Request
from pytest_gpushare.settings.load import Written

TIMEOUT = 30.0
"""Seconds that pytest may take to start without a conftest and without a test."""

MARK = "pytest-gpushare found: "
"""Begins the line of the answer; plugins may print others."""


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
    autoload: bool = True
    request: Request = field(default_factory=Request)
    cpus: int | None = None


def ask(arguments: Sequence[str]) -> PytestView:
    """Start pytest and wait for what it says, at most half a minute. Never raises."""
    command = [sys.executable, "-m", "pytest_gpushare.cli.doctor.child", *arguments]
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
        if MARK in line:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                return _view(json.loads(line.partition(MARK)[2]))
    return PytestView(_complaint(done.stderr) or f"pytest ended with code {done.returncode}")


def _view(found: Mapping[str, Any]) -> PytestView:
    written = dict(found["written"])
    for name in ("root", "ini_directory", "invocation_directory"):
        written[name] = Path(written[name])
    return PytestView(
        **{**found, "written": Written(**written), "request": Request(**found["request"])}
    )


def _complaint(text: str) -> str:
    """The line that says most: pytest's own `ERROR: ...`, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines[-1:] or [""])[0][:400]
